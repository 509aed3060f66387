"""`launcher.launch`: runs a function on several ranks of this machine and returns their results."""

from __future__ import annotations

import io
import linecache
import os
import reprlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from launcher.agent.fork_server_process import RANK_VARIABLES
from launcher.agent.function_call import RANK_MARK, CallFolder, CallOptions, make_pickler
from launcher.core.command_parser import suggest_choice
from launcher.core.error_display import show_once
from launcher.core.errors import (
    CallError,
    LaunchTimeoutError,
    Problem,
    TrainingError,
    UsageError,
    describe_error,
    with_cause_type,
)
from launcher.monitoring.health import format_ranks
from launcher.process.rank_log import read_tail
from launcher.process.rank_status import FOLDER_VARIABLE

R = TypeVar("R")
_ROOT = str(Path(__file__).parents[1])
# Finds this package where the caller found it, and nothing else before Python's own modules.
_AGENT = (
    "import sys; sys.path.append(sys.argv.pop(1)); from launcher.agent.function_agent import main; "
    "sys.exit(main(sys.argv[1:]))"
)
_POLL_INTERVAL = 0.05
# Seconds that the ranks have to end after Ctrl-C, and after the timeout.
_GRACE = 5.0
# Imported once for all ranks if the caller has imported it.
_SHARED_LIBRARIES = ("lightning.pytorch",)


def launch(
    fn: Callable[..., R],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    nproc_per_node: int | Literal["gpu", "cpu", "auto"] = 2,
    backend: str | None = None,
    max_restarts: int = 0,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
) -> list[R]:
    """Call `fn(*args, **kwargs)` on several new processes of this machine, the ranks, and wait for all of them.

    Works in scripts, also without a `__main__` guard, notebooks, tests and threads. The ranks have torchrun's variables
    (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, ...), so `torch.distributed.init_process_group` needs no arguments.
    They have this process's `sys.argv`, `sys.path` and working directory. Their output appears here, with the rank
    before each line. They end when this process ends.

    Args:
        fn: any function: a lambda, one of a notebook cell or one that uses local variables. It is pickled by value
            with the global variables that it uses, except functions of imported modules.
        args: a tuple or list of its arguments, the same for all ranks.
        kwargs: its keyword arguments.
        nproc_per_node: number of ranks; 'gpu' is one for each GPU, 'cpu' one for each core, and 'auto' one for each
            GPU or, without GPUs, for each core.
        backend: initialise a process group with this backend, such as 'gloo' or 'nccl', before the call. By default
            the function does so, if it needs one.
        max_restarts: how often all ranks are started again after one has failed.
        timeout: seconds until the ranks are ended; None for no limit.
        env: environment variables of the ranks, in addition to those of this process.

    Returns:
        The results, in the order of the ranks. CUDA tensors are moved to the CPU.

    Raises:
        CallError: lists every argument that is not valid.
        UsageError: the function or a result cannot be pickled, there is no GPU for 'gpu', or this process is such a
            rank itself.
        TrainingError: a rank failed. It is also an instance of the class of that rank's exception, which is its
            `__cause__`, without attributes that cannot be pickled; of a class that cannot be pickled, it is an
            instance of the nearest base class. `rank` is the rank that failed first, `report` has its traceback.
        LaunchTimeoutError: the timeout has passed.
    """
    problems = [*_check_call(fn, args, kwargs), *_check_options(nproc_per_node, max_restarts, timeout)]
    problems += [*_check_env(env), *_check_backend(backend)]
    if problems:
        raise CallError(problems)
    if RANK_MARK in os.environ:
        raise UsageError(
            f"this is rank {os.environ[RANK_MARK]} of a function that `launcher.launch` runs; a rank cannot launch "
            "further ranks; remove this call, or give the outer one a larger nproc_per_node"
        )
    modules = [name for name in _SHARED_LIBRARIES if name in sys.modules]
    ranks = nproc_per_node if isinstance(nproc_per_node, int) else _count_ranks(nproc_per_node)
    options = CallOptions(ranks, max_restarts, backend or "", modules, sys.path, sys.argv, _list_sources())
    function = _pickle_function(fn, args, kwargs)
    try:
        folder = CallFolder(Path(tempfile.mkdtemp(prefix="launcher-")))
    except OSError as error:
        raise UsageError(
            f"cannot create a temporary folder: {error.strerror or error}; set TMPDIR to a folder with free space"
        ) from error
    try:
        folder.write_call(options, function)
        code = _run_agent(folder, options, {**_caller_environment(), **(env or {})}, timeout)
        return _collect_results(folder, ranks, code)
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)


def _check_call(fn: Any, args: Any, kwargs: Any) -> Iterator[Problem]:
    if not callable(fn):
        yield Problem("fn", f"given {fn!r}; expected a function")
    if not isinstance(args, Sequence) or isinstance(args, str | bytes):
        shown = reprlib.repr(args)
        yield Problem("args", f"given {shown}; expected a tuple or list of all arguments, as in ({shown},)")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        yield Problem("kwargs", f"given {reprlib.repr(kwargs)}; expected a dict of names and values, or None")


def _check_options(ranks: Any, max_restarts: Any, timeout: Any) -> list[Problem]:
    problems: list[Problem] = []
    if ranks not in ("gpu", "cpu", "auto") and (type(ranks) is not int or ranks < 1):
        expected = "a number of ranks, at least 1, or 'gpu', 'cpu' or 'auto'"
        problems.append(Problem("nproc_per_node", f"given {ranks!r}; expected {expected}"))
    if type(max_restarts) is not int or max_restarts < 0:
        problems.append(Problem("max_restarts", f"given {max_restarts!r}; expected a whole number of at least 0"))
    if timeout is not None and (not isinstance(timeout, int | float) or not timeout > 0):
        problems.append(Problem("timeout", f"given {timeout!r}; expected seconds, more than 0, or None"))
    return problems


def _count_ranks(asked: str) -> int:
    from launcher.agent.script_start import count_script_ranks

    return count_script_ranks(asked, "nproc_per_node")


def _check_env(env: Any) -> Iterator[Problem]:
    if env is not None and not isinstance(env, Mapping):
        yield Problem("env", f"given {reprlib.repr(env)}; expected a dict of names and texts, or None")
        return
    for name, value in (env or {}).items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            yield Problem("env", f"given the name {name!r}; expected a text without =")
        elif not isinstance(value, str):
            yield Problem("env", f"{name} is {value!r}; expected a text; write {str(value)!r}")
        elif "\0" in value:
            yield Problem("env", f"{name} is {value!r}; expected a text without the character \\0; remove it")


def _check_backend(backend: Any) -> Iterator[Problem]:
    if backend is None:
        return
    import torch.distributed as dist

    known = [name for name in dist.Backend.backend_list if name != "undefined"] if dist.is_available() else []
    # As in "cpu:gloo,cuda:nccl".
    names = [each.rpartition(":")[2].lower() for each in backend.split(",")] if isinstance(backend, str) else [""]
    if not set(names) <= set(known):
        close = suggest_choice(backend, known)
        yield Problem("backend", f"given {backend!r}; expected one of {', '.join(known)}, or None{close}")


def _pickle_function(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bytes:
    stream = io.BytesIO()
    try:
        make_pickler(stream).dump((fn, tuple(args), dict(kwargs or {})))
    except Exception as error:  # any object may raise anything when it is pickled
        name = getattr(fn, "__qualname__", repr(fn))
        raise UsageError(
            f"cannot send {name} and its arguments to the ranks: {describe_error(error)}; create objects that cannot "
            "be pickled, such as open files, inside the function"
        ) from error
    return stream.getvalue()


def _list_sources() -> dict[str, list[str]]:
    """The source of code that is in no file: cells of a notebook."""
    return {name: list(entry[2]) for name, entry in list(linecache.cache.items())
            if len(entry) == 4 and entry[1] is None and not Path(name).exists()}  # fmt: skip


def _caller_environment() -> dict[str, str]:
    """This process's variables, without those of a rank."""
    dropped = {*RANK_VARIABLES, FOLDER_VARIABLE, "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE"}
    return {name: value for name, value in os.environ.items() if name not in dropped}


def _run_agent(folder: CallFolder, options: CallOptions, env: Mapping[str, str], timeout: float | None) -> int:
    """Run the agent to its end and show the output; returns its exit code."""
    output = _Output(folder, options.ranks)
    deadline = None if timeout is None else time.monotonic() + timeout
    log = os.open(folder.agent_log(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    command = [sys.executable, "-P", "-c", _AGENT, _ROOT, str(folder.path), str(os.getpid())]
    try:
        # In its own session: a Ctrl-C at the terminal reaches it once, through this process.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(env),
                                   start_new_session=True)  # fmt: skip
    finally:
        os.close(log)
    try:
        while process.poll() is None:
            output.show()
            if deadline is not None and time.monotonic() > deadline:
                running = [rank for rank in range(options.ranks) if not folder.has_result(rank)]
                _stop(process, signal.SIGTERM)
                raise LaunchTimeoutError(
                    f"the function did not end within {timeout:g} s: no result from {format_ranks(running)}; give a "
                    "larger timeout, or look for a rank that waits for another one"
                )
            time.sleep(_POLL_INTERVAL)
    except KeyboardInterrupt:
        _stop(process, signal.SIGINT)
        raise
    finally:
        # The ranks end with it.
        process.kill()
        process.wait()
        output.show(is_end=True)
    return process.returncode


def _stop(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Ask the agent to end the ranks, and give them time for it."""
    process.send_signal(number)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()


def _collect_results(folder: CallFolder, ranks: int, code: int) -> list[Any]:
    failure = folder.read_failure()
    if failure is not None and failure.is_explained:
        raise UsageError(failure.report)
    if failure is not None:
        error = TrainingError(failure.report, rank=failure.rank, report=failure.report)
        error.__cause__ = folder.load_error(failure.rank, failure.attempt)
        raise show_once(with_cause_type(error)) from error.__cause__
    missing = [rank for rank in range(ranks) if not folder.has_result(rank)]
    if missing or code != 0:
        lines = read_tail(folder.agent_log(), 2000).strip()
        raise TrainingError(describe_missing(missing, code) + (f"\n{lines}" if lines else ""))
    return [folder.load_result(rank) for rank in range(ranks)]


def describe_missing(ranks: Sequence[int], code: int) -> str:
    """Why these ranks have no result, by the exit code of the agent."""
    who = format_ranks(ranks)
    if code:
        return f"no result from {who}: the agent ended with exit code {code}; see its output"
    return (
        f"no result from {who}: the function ended the process with exit code 0, as sys.exit() does, instead of "
        "returning; make it return"
    )


class _Output:
    """Copies what the agent and the ranks write to this process's stdout, line by line."""

    def __init__(self, folder: CallFolder, ranks: int) -> None:
        self._files = {folder.agent_log(): "", **{folder.log(rank): f"[rank {rank}] " for rank in range(ranks)}}
        self._positions: dict[Path, int] = {}

    def show(self, *, is_end: bool = False) -> None:
        """Write the new lines; at the end, an unfinished one too."""
        for path, prefix in self._files.items():
            try:
                with path.open("rb") as file:
                    file.seek(self._positions.get(path, 0))
                    text = file.read()
            except FileNotFoundError:
                continue
            end = len(text) if is_end else text.rfind(b"\n") + 1
            self._positions[path] = self._positions.get(path, 0) + end
            lines = text[:end].decode("utf-8", errors="replace").splitlines()
            if lines:
                sys.stdout.write("".join(f"{prefix}{line}\n" for line in lines))
                sys.stdout.flush()
