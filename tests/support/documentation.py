"""The code blocks of README.md and of the pages in docs/."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r" +# .*$")

# The reader's own package. The toy has few samples; its module is tested and predicts, too.
USER_PACKAGE = """
from tests.support.toy import Toy, ToyData


class MyModule(Toy):
    def __init__(self, lr: float = 0.05, hf_token: str = "") -> None:
        super().__init__(lr)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[1]).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.net(batch[1]).square().mean())

    def predict_step(self, batch, batch_idx):
        return self.net(batch[1])


class MyData(ToyData):
    def val_dataloader(self):
        return self._ordered()

    test_dataloader = predict_dataloader = val_dataloader

    def _ordered(self):
        from torch.utils.data import DataLoader
        from tests.support.toy import Numbers

        return DataLoader(Numbers(8), batch_size=self.batch_size)
"""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced code block.

    Attributes:
        page: path of the file, relative to the repository.
        language: of the fence.
        title: name of the file that the block shows, if any.
        text: the content.
    """

    page: str
    language: str
    title: str
    text: str


def pages() -> list[Path]:
    """README.md, then all pages of docs/ in the order of a reader: tutorials first."""
    folders = ("", "tutorials", "how-to", "reference", "explanation")
    found = [page for folder in folders for page in sorted((REPOSITORY / "docs" / folder).glob("*.md"))]
    return [REPOSITORY / "README.md", *found]


@cache
def blocks(language: str) -> tuple[Block, ...]:
    """All blocks of one language."""
    return tuple(
        Block(page.relative_to(REPOSITORY).as_posix(), *match.groups(default=""))
        for page in pages()
        for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))
        if match[1] == language
    )


def commands() -> list[tuple[str, str]]:
    """Page and command line of all shell blocks, without comments."""
    return [
        (block.page, _COMMENT.sub("", line)) for block in blocks("bash") for line in block.text.splitlines() if line
    ]


def quoted_commands() -> Iterator[tuple[str, str]]:
    """Page and command line of all `launcher ...` between backticks."""
    for page in pages():
        for text in re.findall(r"(?<!`)`(?:python -m )?(launcher [^`]+)`", page.read_text(encoding="utf-8")):
            yield page.relative_to(REPOSITORY).as_posix(), text


def arguments_of(command: str) -> Sequence[str] | None:
    """The arguments of a launcher command line; None for another program."""
    found = re.match(r"^(?:.*&& )?(?:torchrun .*?-m launcher|python -m launcher|launcher)(?: (.*))?$", command)
    if found is None:
        return None
    return shlex.split(found[1] or "")


def write_user_files(folder: Path) -> None:
    """The reader's package, and every config file that the pages show."""
    (folder / "my_pkg.py").write_text(USER_PACKAGE)
    for block in (*blocks("yaml"), *blocks("python")):
        if block.title in ("train.py",) or (block.title and block.language == "yaml"):
            (folder / block.title).write_text(block.text)
