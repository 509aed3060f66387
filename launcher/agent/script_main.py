"""The main function of a rank that runs a plain script: the process looks as torchrun would have started it."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import faulthandler
import importlib
import importlib.machinery
import io
import itertools
import json
import multiprocessing.process
import os
import platform
import runpy
import signal
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

from launcher.agent.rank_main import STACKS_SIGNAL, read_exit_code
from launcher.agent.script_progress import report_progress
from launcher.core.distribution import __version__
from launcher.core.events import FILE_NAME, EventLog
from launcher.process.heartbeat import NO_STEPS
from launcher.process.rank_status import RankStatusWriter
from launcher.process.rank_streams import await_copied
from launcher.process.titles import name_forks, set_rank_title

# Packages whose versions an attempt records if they are imported.
_RECORDED_VERSIONS = ("torch", "lightning", "transformers", "accelerate", "deepspeed")
# The fork server's start and its imports set these; a script may set them before it imports torch.
_SET_BY_START = ("PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True, slots=True)
class ScriptTask:
    """What each rank runs. It reaches the rank as JSON.

    Attributes:
        target: a Python file or folder, a module's name, or a program, as the user gave it.
        search_path: Python's search path without the launcher's own entries.
        is_safe_path: whether Python must not add the script's folder to it (PYTHONSAFEPATH).
        run: absolute path of the run directory; None without one.
        role: torchrun's name for the ranks.
        unset: variables that the start has set and the user has not.
        reports_progress: whether a hang counts, so that the rank reports the collectives that it enters.
    """

    kind: Literal["file", "module", "program"]
    target: str
    arguments: tuple[str, ...]
    search_path: tuple[str, ...]
    is_safe_path: bool = False
    run: str | None = None
    role: str = "default"
    max_restarts: int = 0
    unset: tuple[str, ...] = ()
    reports_progress: bool = False

    def to_json(self) -> str:
        """One text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ScriptTask:
        """The inverse."""
        values = json.loads(text)
        lists = {name: tuple(values[name]) for name in ("arguments", "search_path", "unset")}
        return cls(**{**values, **lists})


class _MainProcess(multiprocessing.process.BaseProcess):
    """As the object of `multiprocessing` for a process that it has not started, which has no public class."""

    def __init__(self, before: Any) -> None:
        # The key and the folder for sockets stay.
        self._config = {"semprefix": "/mp", **before._config, "daemon": False}
        self._identity, self._name, self._parent_pid, self._popen, self._closed = (), "MainProcess", None, None, False

    def close(self) -> None:
        """Nothing to close."""


def find_unset_variables(env: Mapping[str, str]) -> tuple[str, ...]:
    """The variables that the start sets and `env` does not have."""
    return tuple(name for name in _SET_BY_START if name not in env)


def run_script(arguments: Sequence[str]) -> int:
    """Run the task in `arguments[0]` in this rank; returns the exit code."""
    task = ScriptTask.from_json(arguments[0])
    status = RankStatusWriter.from_env(os.environ)
    rank = os.environ["RANK"]
    status.beat(NO_STEPS)
    set_rank_title(int(rank), int(os.environ["WORLD_SIZE"]), None if task.run is None else Path(task.run).name)
    name_forks(int(rank))
    if task.run is not None:
        log = Path(task.run) / "logs" / f"rank-{rank}.log"
        status.update(run=task.run, log=str(log))
        _write_crashes_to(log)
        if rank == "0":
            _write_start(Path(task.run))
    # torchelastic counts from the launcher's own limit.
    os.environ.update(ROLE_NAME=task.role, TORCHELASTIC_MAX_RESTARTS=str(task.max_restarts))
    for name in task.unset:
        os.environ.pop(name, None)
    if task.kind == "program":
        _become_program(task)
    _become_main_process(task)
    if task.reports_progress:
        report_progress(status)
    if rank != "0":
        _hide_usage_errors(status)
    try:
        _run_main(task)
    except SystemExit as error:
        return read_exit_code(error)
    except KeyboardInterrupt as error:
        _write_traceback(error, status)
        return 128 + signal.SIGINT
    except BaseException as error:  # noqa: BLE001 -- the outermost frame of the script: reports the error, then exits
        own = _without_launcher_frames(error)
        status.record_error(own)
        _write_traceback(own, status)
        return 1
    return 0


def _write_crashes_to(log: Path) -> None:
    """Write the stacks of a crash to the log only: the agent shows them in its report."""
    with contextlib.suppress(OSError):
        # Stays open until the process ends: faulthandler writes to the descriptor.
        faulthandler.enable(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC))


def _write_start(run: Path) -> None:
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in _RECORDED_VERSIONS}
    versions = {"launcher": __version__, **{name: str(version) for name, version in loaded.items() if version}}
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    EventLog(run / FILE_NAME, rank=0).write(
        "run_started", name=run.name, attempt=f"{os.environ.get('TORCHELASTIC_RUN_ID')}-{restarts}",
        restart_count=restarts, source="launcher run", config_digest=None, wandb_id=None, host=platform.node(),
        versions=versions)  # fmt: skip


def _become_program(task: ScriptTask) -> NoReturn:
    """Replace this process by a program; it keeps the streams, and ends with the agent."""
    # A program would be killed by a signal that it does not know; ignored signals stay ignored.
    faulthandler.unregister(STACKS_SIGNAL)
    signal.signal(STACKS_SIGNAL, signal.SIG_IGN)
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    signal.signal(signal.SIGTTIN, signal.SIG_DFL)
    try:
        os.execvp(task.target, [task.target, *task.arguments])  # noqa: S606 -- no shell is needed
    except OSError as error:
        sys.stderr.write(f"{task.target}: {error.strerror}\n")
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _become_main_process(task: ScriptTask) -> None:
    """Look like a process that the user started: `multiprocessing`, the search path and the arguments."""
    process: Any = multiprocessing.process
    process._current_process, process._parent_process = _MainProcess(process._current_process), None
    process._children, process._process_counter = set(), itertools.count(1)
    # The agent's main module, which `multiprocessing` has imported.
    sys.modules.pop("__mp_main__", None)
    folder = _first_entry(task)
    sys.path[:] = [*([] if folder is None else [folder]), *task.search_path]
    sys.argv = [task.target, *task.arguments]
    sys.orig_argv = [sys.executable, "-u", *(["-m"] if task.kind == "module" else []), *sys.argv]
    importlib.invalidate_caches()
    if folder is not None:
        _forget_shadowed_modules(folder)


def _first_entry(task: ScriptTask) -> str | None:
    """The entry that Python adds: the working directory for `-m`, the script's folder, or the folder that is run."""
    path = Path(task.target)
    if task.kind == "file" and not path.is_file():
        return str(path.absolute())
    if task.is_safe_path:
        return None
    return str(Path.cwd()) if task.kind == "module" else str(path.resolve().parent)


def _forget_shadowed_modules(folder: str) -> None:
    """Forget modules that the fork server imported and for which the script's folder has one of the same name."""
    try:
        names = {entry.partition(".")[0] for entry in os.listdir(folder)}  # noqa: PTH208 -- only the names are needed
    except OSError:
        return
    loaded = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
    for name in (loaded & names) - {"__main__"}:
        spec = importlib.machinery.PathFinder.find_spec(name, [folder])
        module = sys.modules.get(name)
        if spec is None or spec.loader is None or getattr(module, "__file__", None) == spec.origin:
            continue
        for inner in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
            del sys.modules[inner]


def _hide_usage_errors(status: RankStatusWriter) -> None:
    """Write help and usage errors of `argparse` to this rank's log only: rank 0 shows the same text."""

    def write_to_log(self: argparse.ArgumentParser, message: str, file: IO[str] | None = None) -> None:
        if message and file in (None, sys.stdout, sys.stderr):
            status.append_to_log(message)
        elif message and file is not None:
            file.write(message)

    setattr(argparse.ArgumentParser, "_print_message", write_to_log)  # noqa: B010 -- private


def _run_main(task: ScriptTask) -> None:
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if task.kind == "module":
        vars(runpy)["_run_module_as_main"](task.target)
        return
    if not Path(task.target).is_file():
        # A folder or an archive with a `__main__.py`.
        vars(runpy)["_run_module_as_main"]("__main__", alter_argv=False)
        return
    path = os.path.abspath(task.target)  # noqa: PTH100 -- as Python does, without resolving links
    values: dict[str, Any] = {"__file__": path, "__cached__": None, "__builtins__": builtins,
                              "__loader__": importlib.machinery.SourceFileLoader("__main__", path)}  # fmt: skip
    vars(main).update(values)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, vars(main))  # noqa: S102 -- the user's script


def _without_launcher_frames(error: BaseException) -> BaseException:
    """The error with a traceback that begins in the user's code."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>", runpy.__file__):
        frames = frames.tb_next
    return error.with_traceback(frames)


def _write_traceback(error: BaseException, status: RankStatusWriter) -> None:
    """Write the traceback to the log, as the agent shows it once; a script's own `sys.excepthook` runs instead."""
    if _find_own_hook() is not sys.__excepthook__:
        sys.excepthook(type(error), error, error.__traceback__)
        # The report of the agent quotes it from there.
        status.append_to_log("".join(traceback.format_exception(error)))
        return
    await_copied()
    status.write_traceback(error)


def _find_own_hook() -> Any:
    """The exception hook without torch's, which `init_process_group` puts around it to prefix lines with the rank."""
    hook: Any = sys.excepthook
    while getattr(hook, "__name__", "") == "_distributed_excepthook":
        inner = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True))
        hook = inner["old_hook"].cell_contents if "old_hook" in inner else sys.__excepthook__
    return hook
