"""A small process that reports the end of another one, which imports a user's module and cannot report it itself.

It is run as a file, with the standard library only, so that it starts in milliseconds. Its input has a line for each
import, faulthandler's report if the process crashes, and `DONE` after the last import.
"""

from __future__ import annotations

import os
import re
import select
import sys

IMPORTING = "importing "
DONE = "done"
_FRAME = re.compile(r'  File "(.+)", line (\d+) in ')
_FATAL = "Fatal Python error: "


def describe_end(received: str, libraries: tuple[str, ...]) -> str | None:
    """The report about a process that ended after this input; None if its imports were done.

    `libraries` are folders whose files are not the user's.
    """
    lines = received.splitlines()
    if DONE in lines:
        return None
    subject = next((line.removeprefix(IMPORTING) for line in reversed(lines) if line.startswith(IMPORTING)), "a module")
    cause = next((line.removeprefix(_FATAL) for line in lines if line.startswith(_FATAL)), None)
    frames = (found.groups() for line in lines if (found := _FRAME.match(line)))
    own = (frame for frame in frames if not frame[0].startswith(("<", *libraries)) and "-packages" not in frame[0])
    place = "".join(f" ({file}, line {line})" for file, line in list(own)[:1])
    if cause is None:
        return (
            f"error: this process ended while it imported {subject}: the module, or a library that it imports, ended "
            "it without an error, or it was killed; correct the module, or give another path"
        )
    return (
        f"error: this process crashed while it imported {subject}: {cause}{place}; correct the module, or give another "
        "path"
    )


def _is_running(process: int | None, timeout: float | None) -> bool:
    return process is not None and not select.select([process], [], [], timeout)[0]


def _main() -> None:
    libraries = tuple(sys.argv[2:])
    try:
        process = os.pidfd_open(int(sys.argv[1]))
    except OSError:
        process = None  # it has ended
    received = b""
    while DONE.encode() not in received.splitlines():
        ready = select.select([0, *([] if process is None else [process])], [], [])[0]
        part = os.read(0, 65536) if 0 in ready else b""
        received += part
        if not part:
            # The end of the input, or of the process if its children keep the input open.
            _is_running(process, None)
            break
    report = describe_end(received.decode(errors="replace"), libraries)
    if report is not None:
        os.write(2, f"{report}\n".encode())


if __name__ == "__main__":
    _main()
