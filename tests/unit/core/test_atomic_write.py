"""A file is replaced atomically: old content or new content, mode 0600, no partial file."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from launcher.core.atomic_write import replace_file, write_file


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_written_with_mode_0600(tmp_path: Path, durable: bool) -> None:
    file = tmp_path / "a.json"
    write_file(file, "old")
    write_file(file, "n\u00e9w", durable=durable)
    assert file.read_text(encoding="utf-8") == "n\u00e9w"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_while_writing_keeps_the_old_content(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "weights.pt"
    write_file(file, "old")

    def write() -> None:
        with replace_file(file) as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target, file = tmp_path / "target", tmp_path / "a.json"
    target.write_text("mine")
    file.symlink_to(target)
    write_file(file, "new")
    assert (target.read_text(), file.read_text(), file.is_symlink()) == ("mine", "new", False)
