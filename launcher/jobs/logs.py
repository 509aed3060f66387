"""What a rank has said, in every attempt of its run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.core.errors import NoSuchRunError
from launcher.runs.job_output import JobOutput, find_job_output

_LOOK_EVERY = 0.5


def log_files(run: Path, rank: int) -> list[Path]:
    """A rank's logs, the oldest attempt's first; `rank-0.log` is the newest one's."""
    numbered: list[tuple[int, Path]] = []
    for file in (run / "logs").glob(f"rank-{rank}.*.log"):
        found = re.fullmatch(rf"rank-{rank}\.(\d+)\.log", file.name)
        if found:
            numbered.append((int(found[1]), file))
    newest = run / "logs" / f"rank-{rank}.log"
    return [file for _, file in sorted(numbered)] + ([newest] if newest.exists() else [])


def read_log(run: Path, rank: int) -> Iterator[bytes]:
    """All that the rank has said so far.

    Raises:
        NoSuchRunError: no such rank has said anything.
    """
    files = log_files(run, rank)
    said = find_job_output(run)
    if not files and said is None:
        ranks = sorted(
            {int(m[1]) for f in (run / "logs").glob("rank-*.log") if (m := re.match(r"rank-(\d+)\.", f.name))}
        )
        known = f"ranks with a log: {', '.join(map(str, ranks))}" if ranks else "no rank has begun yet"
        raise NoSuchRunError(f"rank {rank} of run {run.name!r} has no log; {known}")
    for file in files:
        yield file.read_bytes()
    if said is not None:
        yield _headed(said)


def follow_log(
    run: Path, rank: int, has_ended: Callable[[], bool], sleep: Callable[[float], None] = time.sleep
) -> Iterator[bytes]:
    """All that the rank has said, and what it says from now on in this attempt and in later ones.

    Args:
        run: the run's directory.
        rank: whose log.
        has_ended: whether nothing more comes of the run.
        sleep: between two looks.
    """
    read: dict[int, int] = {}
    while True:
        # Asked first: what was written before the end is then read after it.
        ended = has_ended()
        for file in log_files(run, rank):
            # An earlier attempt's log gets another name and stays the same file.
            try:
                with file.open("rb") as stream:
                    inode = file.stat().st_ino
                    stream.seek(read.get(inode, 0))
                    new = stream.read()
            except FileNotFoundError:
                continue  # it is being renamed; the next look finds it
            read[inode] = read.get(inode, 0) + len(new)
            if new:
                yield new
        if ended:
            said = find_job_output(run)
            if said is not None:
                yield _headed(said)
            return
        sleep(_LOOK_EVERY)


def _headed(said: JobOutput) -> bytes:
    return f"no rank of the newest job has begun; it said, in {said.file}:\n".encode() + said.file.read_bytes()
