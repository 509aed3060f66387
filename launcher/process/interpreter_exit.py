"""Ends a forked process as the interpreter ends, which `multiprocessing` and `os._exit` skip."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import io
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Collection
from typing import Any, NoReturn
from zipfile import ZipFile

OpenFiles = Collection["weakref.ref[Any]"]


def list_open_files() -> list[weakref.ref[Any]]:
    """The file objects of this process, to leave them alone later; they stay free to be closed."""
    return list(map(weakref.ref, _find_open_files()))


def _find_open_files() -> list[Any]:
    """The file objects that may hold unwritten data, those that write to others first."""
    # By type: `isinstance` asks the object, and one of torch's then warns.
    is_file = functools.cache(lambda kind: issubclass(kind, io.IOBase | ZipFile))
    found = [each for each in gc.get_objects() if is_file(type(each)) and not _is_closed(each)]
    return sorted(found, key=_level)


def exit_process(code: int, *, main: Any = None, before: OpenFiles = ()) -> NoReturn:
    """Wait for threads, run exit functions, delete the script's objects, close its files, and end with `code`.

    Args:
        code: exit code.
        main: the `__main__` that the process started with; another one is a script's, and its objects are deleted.
        before: files that existed at the start, whose unwritten data belongs to the parent process.
    """
    shutdown: Callable[[], Any] = vars(threading)["_shutdown"]
    run_exit_functions: Callable[[], Any] = vars(atexit)["_run_exitfuncs"]
    try:
        shutdown()
        run_exit_functions()
    except BaseException:  # noqa: BLE001 -- an exception in an exit function must not change the exit code
        traceback.print_exc()
    if main is not None and sys.modules.get("__main__") is not main:
        sys.modules["__main__"] = main
        flush_files(before)
        gc.collect()
    close_files(before)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def flush_files(before: OpenFiles = ()) -> None:
    """Write what is buffered: of text in a reference cycle, Python may close the file first, or nothing at all."""
    for each in _list_own_files(before):
        with contextlib.suppress(Exception):  # see `close_files`
            if isinstance(each, io.IOBase):
                each.flush()


def close_files(before: OpenFiles) -> None:
    """Close the files that were opened since `before`: at its end Python closes what the program has not closed."""
    for each in _list_own_files(before):
        # A full disk, or a file of a broken connection: Python would ignore it too.
        with contextlib.suppress(Exception):
            each.close()


def _list_own_files(before: OpenFiles) -> list[Any]:
    streams = (sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__)
    kept = {id(each) for stream in streams for each in (stream, getattr(stream, "buffer", None))}
    kept.update(id(reference()) for reference in before)
    return [each for each in _find_open_files() if id(each) not in kept]


def _is_closed(file: Any) -> bool:
    try:
        return file.fp is None if isinstance(file, ZipFile) else bool(file.closed)
    except Exception:  # noqa: BLE001 -- a class of the user's may raise anything
        return True


def _level(file: Any) -> int:
    """Text is encoded into a compressed file or a buffer, and that is written to a descriptor."""
    if isinstance(file, io.TextIOBase):
        return 0
    if isinstance(file, io.FileIO):
        return 3
    return 2 if type(file) in (io.BufferedWriter, io.BufferedRandom, io.BufferedReader) else 1
