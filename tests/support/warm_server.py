"""A process that has imported torch, Lightning and the launcher, and forks into `python ...` processes.

Tests of real processes spend most of their time on those imports. A process that a test starts
here has its own session, environment, directory, arguments and exit code; only its modules are already imported.
Tests of the start use a new interpreter (`tests.support.processes.run(..., fresh=True)`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import termios
import types
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from launcher.process.interpreter_exit import exit_process, list_open_files
from tests.support.warm import SHOW_STACKS

# Imports of every rank and its agent. Not user modules: the rank imports them and reports their errors.
MODULES = ("torch", "torch.distributed", "lightning.pytorch", "torchdata.stateful_dataloader",
           "launcher.agent.rank_main",
           "launcher.training.fit", "launcher.hardware.devices", "launcher.hardware.rank_count",
           "launcher.user_code.classes",
           "launcher.config.loading", "launcher.config.validation", "launcher.checkpoint.resume",
           "launcher.training.run",
           "launcher.cli.summary", "docstring_parser", "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
           "launcher.agent.agent", "launcher.agent.rendezvous", "launcher.agent.start", "launcher.planning.dry_run",
           "launcher.planning.profile", "rich.progress")  # fmt: skip
# Variables that these imports set in each process if they are not set.
_SET_BY_IMPORTS: dict[str, str] = {}
_HANDLED = [number for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)]


def serve(listener: socket.socket, modules: Sequence[str]) -> None:
    """Send the search path, then fork for each connection until the other end of stdin is closed."""
    from launcher.core.gc_paused import quick_imports

    # The first entry is for `-m`: each process has its own.
    path = sys.path[1:]
    before = dict(os.environ)
    with quick_imports():
        for name in modules:
            importlib.import_module(name)
    _SET_BY_IMPORTS.update({name: value for name, value in os.environ.items() if name not in before})
    threads = os.listdir("/proc/self/task")  # noqa: PTH208 -- bare numbers are wanted
    if len(threads) > 1:
        raise RuntimeError(f"importing {modules} left {len(threads) - 1} threads, which a fork does not survive")
    with listener.accept()[0] as first:
        first.sendall(f"{json.dumps(path)}\n".encode())
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    children: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, woken, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
            _send_exit_codes(children)
        if listener in ready:
            connection, _ = listener.accept()
            pid = _fork(connection, (listener, *children.values()), (woken, wake))
            connection.sendall(f"{pid}\n".encode())
            children[pid] = connection


def _send_exit_codes(children: dict[int, socket.socket]) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with children.pop(pid) as connection, contextlib.suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _fork(connection: socket.socket, sockets: Sequence[socket.socket], pipe: Sequence[int]) -> int:
    """Fork a process that runs the request of the connection."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 2)
    asked = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
    of_the_server = [*(each.fileno() for each in (connection, *sockets)), *pipe]
    pid = os.fork()
    if not pid:
        _be_child(asked, descriptors, of_the_server)
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


def _be_child(asked: dict[str, Any], descriptors: Sequence[int], of_the_server: Sequence[int]) -> NoReturn:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor in of_the_server:
        os.close(descriptor)
    os.setsid()
    for descriptor, standard in zip((descriptors[0], descriptors[1], descriptors[1]), (0, 1, 2), strict=True):
        os.dup2(descriptor, standard)
    for descriptor in descriptors:
        os.close(descriptor)
    if asked["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    _become(asked)


def _become(asked: dict[str, Any]) -> NoReturn:
    """Run `python ARGUMENTS` up to the exit code."""
    arguments, folder = asked["arguments"], asked["cwd"]
    os.environ.clear()
    os.environ.update({**_SET_BY_IMPORTS, **asked["env"]})
    os.chdir(folder)
    faulthandler.register(SHOW_STACKS)
    own = [entry for entry in asked["env"].get("PYTHONPATH", "").split(os.pathsep) if entry]
    first = {"-m": folder, "-c": ""}.get(arguments[0], str(Path(arguments[0]).absolute().parent))
    sys.path[:] = [first, *own, *asked["path"]]
    sys.orig_argv = [sys.executable, *arguments]
    importlib.invalidate_caches()
    _set_rank_zero()
    _fork_the_fork_server()

    def be_it() -> None:
        if arguments[0] == "-m":
            sys.argv = ["", *arguments[2:]]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(arguments[1], vars(main))  # noqa: S102 -- a test's own script
        else:
            sys.argv = arguments
            runpy.run_path(str(Path(arguments[0]).absolute()), run_name="__main__")

    _leave(be_it)


def _set_rank_zero() -> None:
    """Set Lightning's rank, which it reads on import: the server had none."""
    from lightning_utilities.core.rank_zero import rank_zero_only

    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        if name in os.environ:
            vars(rank_zero_only)["rank"] = int(os.environ[name])
            return


def _fork_the_fork_server() -> None:
    """Fork the launcher's fork server from this process too, while it has no threads."""
    import multiprocessing.forkserver
    import multiprocessing.resource_tracker
    import multiprocessing.util

    spawn = multiprocessing.util.spawnv_passfds

    def fork_or_spawn(path: Any, args: Sequence[str], passfds: Sequence[int]) -> int:
        if "multiprocessing.forkserver" not in args[-1] or len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208
            return spawn(path, args, passfds)
        pid = os.fork()
        if pid:
            return pid
        # Reset signals and descriptors as an exec does.
        for number in _HANDLED:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        kept = {0, 1, 2, *passfds}
        for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
            if int(entry) not in kept:
                with contextlib.suppress(OSError):
                    os.close(int(entry))
        for descriptor in passfds:
            os.set_inheritable(descriptor, True)
        # Locks and temporary folders belong to the agent.
        for state in (multiprocessing.forkserver.ensure_running, multiprocessing.resource_tracker.ensure_running):
            owner = state.__self__
            owner.__init__()
        vars(weakref.finalize)["_registry"].clear()
        sys.argv = ["-c"]
        _leave(lambda: exec(args[-1], {"__name__": "__main__"}))  # noqa: S102 -- the arguments that would follow `python -c`

    multiprocessing.util.spawnv_passfds = fork_or_spawn


def _leave(body: Any) -> NoReturn:
    """End as an interpreter does: traceback, exit functions, files, exit code."""
    files = list_open_files()
    code = 1
    try:
        body()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1 if ending.code else 0
        if isinstance(ending.code, str):
            sys.stderr.write(f"{ending.code}\n")
    except BaseException as error:  # noqa: BLE001 -- the last frame of this process
        # Libraries install their own hook.
        sys.excepthook(type(error), error, error.__traceback__)
    exit_process(code, before=files)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as own_listener:
        serve(own_listener, [*MODULES, *sys.argv[2:]])
