"""The main function of a rank of `launcher.launch`: calls the function and writes its result or its error."""

from __future__ import annotations

import linecache
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.agent.function_call import RANK_MARK, CallFolder, CallOptions
from launcher.process.heartbeat import NO_STEPS
from launcher.process.rank_status import RankStatusWriter


def run_function(arguments: Sequence[str]) -> int:
    """Call the function as one rank; `arguments` is the folder of the call. Returns the exit code."""
    folder, rank = CallFolder(Path(arguments[0])), int(os.environ["RANK"])
    status = RankStatusWriter.from_env(os.environ)
    _redirect_output(folder.log(rank))
    status.update(log=folder.log(rank))
    status.beat(NO_STEPS)
    try:
        _call(folder, rank)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # the caller was interrupted
    except Exception as error:  # noqa: BLE001 -- any exception of the function: the caller raises it
        if error.__traceback__ is not None:
            # Without the frames of this module.
            error = error.with_traceback(error.__traceback__.tb_next and error.__traceback__.tb_next.tb_next)
        status.record_error(error)
        folder.save_error(rank, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), error)
        return 1
    return 0


def _call(folder: CallFolder, rank: int) -> None:
    folder.discard_result(rank)
    options = folder.read_options()
    _prepare_imports(options)
    function, args, kwargs = folder.load_function()
    os.environ[RANK_MARK] = str(rank)
    if options.backend:
        import torch.distributed as dist

        dist.init_process_group(options.backend)
    result = function(*args, **kwargs)
    folder.save_result(rank, result)
    _destroy_process_group()


def _prepare_imports(options: CallOptions) -> None:
    """Import from the caller's folders with its `sys.argv`; tracebacks show the source of its notebook cells."""
    sys.path[:] = list(options.path)
    sys.argv[:] = list(options.arguments)
    for name, lines in options.sources.items():
        linecache.cache[name] = (sum(map(len, lines)), None, list(lines), name)


def _redirect_output(path: Path) -> None:
    """Write the output of this process, and of its child processes, to a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(line_buffering=True, errors="backslashreplace")


def _destroy_process_group() -> None:
    """Destroy a group that the function has left: NCCL warns about it at the end of the process."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
