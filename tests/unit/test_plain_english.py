"""Words that readers of every mother tongue would stumble over stay out of code, messages and documentation."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("launcher", "strategies", "slurm", "docs")

# In prose and in names: what is rejected, and what to write. Names are looked at part by part.
REJECTED = {
    r"told|tell|tells|telling": "report, state, inform, write; for names: describe, summarize, note",
    r"says?|said|saying": "states, reports, reads; 'the config sets', 'the error lists'",
    r"hears?|heard": "receives",
    r"words": "arguments (of a command line); text, message",
    r"wish|wishes|wished": "request; was requested",
    r"vain": "timed out",
    r"deaf": "ignores",
    r"mend|mends|mended": "fix",
    r"nobody": "no rank, no process, none",
}
# In prose alone.
REJECTED_PHRASES = {
    r"go(es|ne|ing)? on with": "continue from, resume; cannot restore",
    r"went on with": "continued from",
    r"stand(s|ing)? in the way": "block",
    r"so \w+ that it may": "two sentences",
    r"look(s|ed|ing)? whether": "check whether",
    r"for who has": "for users with",
    r"is sound|are sound": "is healthy, works",
    r"(newest|last|a|the|not|is|are|no) whole( one)?( checkpoint)?(?=[ ,.;:`]*(checkpoint|$))": "valid",
    r"whole checkpoint": "valid checkpoint",
    r"in the middle of nowhere|\bfor ever\b": "forever; does not end",
    r"of its own accord|by and by|\b(hence|thereof|whence|lest|thus)\b": "plain English",
    r"\bupon\b": "on",
    r"what came of": "the result of",
    r"in its own words": "its own message",
}
_NAME = re.compile("|".join(f"(?:{pattern})" for pattern in REJECTED), re.IGNORECASE)
_WORD = re.compile(r"(?<![\w])(?:" + "|".join(REJECTED) + r")(?![\w'])", re.IGNORECASE)
_PHRASE = re.compile(r"(?<!\w)(?:" + "|".join(f"(?:{pattern})" for pattern in REJECTED_PHRASES) + r")(?!\w)", re.I)


def _files() -> list[Path]:
    found = [REPOSITORY / "README.md"]
    for folder in FOLDERS:
        found += [path for path in (REPOSITORY / folder).rglob("*")
                  if path.suffix in (".py", ".md", ".html", ".yaml", ".j2") and path.is_file()]  # fmt: skip
    return sorted(found)


def _prose(text: str) -> Iterator[str]:
    for pattern in (_WORD, _PHRASE):
        yield from (match[0] for match in pattern.finditer(text))


def _parts(name: str) -> list[str]:
    """`read_words` and `RankWords` in their parts."""
    return re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)


def _is_key(text: str) -> bool:
    """A literal that is one identifier: a key of a record, which other versions wrote too."""
    return text.strip("\"'").isidentifier()


def findings(path: Path) -> list[str]:
    """Each rejected word of a file, with its line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        lines = enumerate(text.splitlines(), 1)
        return [f"{path.name}:{number}: {word}" for number, line in lines for word in _prose(line)]
    found: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            found += [f"{path.name}:{token.start[0]}: {token.string}" for part in _parts(token.string)
                      if _NAME.fullmatch(part)]  # fmt: skip
        elif token.type in (tokenize.COMMENT, tokenize.STRING) and not _is_key(token.string):
            for offset, line in enumerate(token.string.splitlines()):
                found += [f"{path.name}:{token.start[0] + offset}: {word}" for word in _prose(line)]
    return found


@pytest.mark.parametrize("path", _files(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_rejected_word_is_in(path: Path) -> None:
    hint = "; ".join(f"{bad} -> {good}" for bad, good in {**REJECTED, **REJECTED_PHRASES}.items())
    assert findings(path) == [], hint


def test_rejected_words_are_found_in_names_comments_and_texts(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        '"""The ranks are told."""\ndef tell_all(words):  # in vain\n    return "mend this"\nkey = {"told": 1}\n'
    )
    assert [each.split(": ")[1] for each in findings(bad)] == ["told", "tell_all", "words", "vain", "mend"]
