"""The agent's copies of its ranks' output."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.agent.rank_output import RankOutput
from launcher.process.rank_streams import count_unread, stream_path

# What a rank writes, and the lines of its log.
CASES = [
    (b"one\ntwo\n", b"one\ntwo\n"),
    (b"no line end", b"no line end\n"),
    (b"\r 10%|#\r 90%|###\r100%|####\ndone\n", b"100%|####\ndone\n"),
    (b"windows\r\n", b"windows\n"),
    (b"\x1b[32mgreen\x1b[0m\n", b"green\n"),
    (b"\x1b[2A\x1b[Jredrawn\nkept\n", b"kept\n"),
    (b"\xff\xfe\n", b"\xff\xfe\n"),
    (b"x" * 70_000 + b"\n", b"x" * 70_000 + b"\n"),
]
Write = Callable[[int, int, bytes], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "attempt"
    made.mkdir()
    return made


def _write(folder: Path, rank: int, descriptor: int, data: bytes) -> None:
    opened = os.open(stream_path(folder, rank, descriptor), os.O_WRONLY)
    with os.fdopen(opened, "wb") as stream:
        stream.write(data)


@pytest.mark.parametrize(("written", "logged"), CASES)
def test_a_log_has_the_text_without_redraws(
    written: bytes, logged: bytes, folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "logs").mkdir()
    output = RankOutput(tmp_path / "logs", lambda rank, local: True)
    output.start_attempt(folder, [0, 1])
    for rank in (0, 1):
        _write(folder, rank, 2, written)
        output.drain()
    output.end_attempt()
    for rank in (0, 1):
        assert (tmp_path / "logs" / f"rank-{rank}.log").read_bytes() == logged
    shown = capfdbinary.readouterr().err
    assert shown.startswith(written), "rank 0 is shown as it writes"
    others = b"".join(b"[rank 1] " + line for line in logged.splitlines(keepends=True))
    assert shown[len(written) :].replace(b"\x1b[32m", b"").replace(b"\x1b[0m", b"").lstrip(b"\n") == others


def test_each_stream_goes_to_its_own_and_hidden_ranks_to_their_logs(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    output = RankOutput(tmp_path / "logs", lambda rank, local: (rank, local) != (5, 1))
    output.start_attempt(folder, [4, 5])
    for rank in (4, 5):
        _write(folder, rank, 1, b"out\n")
        _write(folder, rank, 2, b"err\n")
    output.end_attempt()
    assert capfd.readouterr() == ("[rank 4] out\n", "[rank 4] err\n")
    assert sorted((tmp_path / "logs" / "rank-5.log").read_text().split()) == ["err", "out"]


def test_the_logs_of_earlier_attempts_stay(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    output = RankOutput(tmp_path / "logs", lambda rank, local: False)
    for attempt in range(3):
        inner = folder / str(attempt)
        inner.mkdir()
        output.start_attempt(inner, [0])
        _write(inner, 0, 1, f"attempt {attempt}\n".encode())
    output.end_attempt()
    logs = {file.name: file.read_text() for file in (tmp_path / "logs").iterdir()}
    assert logs == {"rank-0.1.log": "attempt 0\n", "rank-0.2.log": "attempt 1\n", "rank-0.log": "attempt 2\n"}


def test_a_rank_runs_without_a_log_if_it_cannot_be_written(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = RankOutput(tmp_path / "missing", lambda rank, local: True)
    output.start_attempt(folder, [0])
    _write(folder, 0, 1, b"shown\n")
    output.end_attempt()
    assert capfd.readouterr().out == "shown\n"


def _wait_until_copied(folder: Path, output: RankOutput, rank: int) -> None:
    pipe = os.open(stream_path(folder, rank, 1), os.O_WRONLY)
    while count_unread(pipe):
        time.sleep(0.001)
    os.close(pipe)
    with vars(output)["_reading"]:
        pass


def test_the_lines_of_two_ranks_are_whole(
    folder: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.agent.rank_output._HOLD", 60.0)
    output = RankOutput(None, lambda rank, local: True)
    output.start_attempt(folder, [0, 1])
    pieces = [(0, b"a"), (1, b"other\n"), (0, b" "), (0, b"b"), (1, b"more\n"), (0, b"\n"), (0, b"question: "),
              (1, b"last\n")]  # fmt: skip
    for rank, data in pieces:
        _write(folder, rank, 1, data)
        _wait_until_copied(folder, output, rank)
    # Rank 0 does not end its line: the other rank's line is shown all the same.
    output.drain()
    _write(folder, 0, 1, b"\nend\n")
    output.end_attempt()
    shown = capfdbinary.readouterr().out
    assert shown == b"a b\n[rank 1] other\n[rank 1] more\nquestion: \n[rank 1] last\nend\n"
