"""The log of a rank over all attempts of its run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.core.errors import NoSuchRunError
from launcher.runs.job_output import find_job_output

_POLL_SECONDS = 0.5


def find_logs(run: Path, rank: int) -> list[Path]:
    """A rank's logs, oldest attempt first; `rank-0.log` is that of the newest attempt."""
    numbered: list[tuple[int, Path]] = []
    for file in (run / "logs").glob(f"rank-{rank}.*.log"):
        found = re.fullmatch(rf"rank-{rank}\.(\d+)\.log", file.name)
        if found:
            numbered.append((int(found[1]), file))
    newest = run / "logs" / f"rank-{rank}.log"
    return [file for _, file in sorted(numbered)] + ([newest] if newest.exists() else [])


def read_log(run: Path, rank: int) -> Iterator[bytes]:
    """The log so far.

    Raises:
        NoSuchRunError: the rank has no log.
    """
    if not find_logs(run, rank) and find_job_output(run) is None:
        ranks = sorted(
            {int(m[1]) for f in (run / "logs").glob("rank-*.log") if (m := re.match(r"rank-(\d+)\.", f.name))}
        )
        known = f"ranks with a log: {', '.join(map(str, ranks))}" if ranks else "no rank has started yet"
        raise NoSuchRunError(f"rank {rank} of run {run.name!r} has no log; {known}")
    yield from follow_log(run, rank, lambda: True)


def follow_log(
    run: Path, rank: int, has_ended: Callable[[], bool], sleep: Callable[[float], None] = time.sleep
) -> Iterator[bytes]:
    """The log so far, and everything that this attempt and later ones add, until the run `has_ended`."""
    read: dict[int, int] = {}
    while True:
        # Checked before reading; otherwise the last lines could be missed.
        ended = has_ended()
        for file in find_logs(run, rank):
            # The next attempt renames the log, which keeps its inode.
            try:
                with file.open("rb") as stream:
                    inode = file.stat().st_ino
                    stream.seek(read.get(inode, 0))
                    new = stream.read()
            except FileNotFoundError:
                continue  # the file is being renamed; the next read finds it
            read[inode] = read.get(inode, 0) + len(new)
            if new:
                yield new
        if ended:
            output = find_job_output(run)
            if output is not None:
                yield f"no rank of the newest job has started; its output in {output.file}:\n".encode()
                yield output.file.read_bytes()
            return
        sleep(_POLL_SECONDS)
