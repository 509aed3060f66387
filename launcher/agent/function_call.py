"""What the processes of `launcher.launch` send each other: files in a private folder, which the caller removes.

The caller writes the call, each rank its output, and its result or error, and the agent the first failure.
"""

from __future__ import annotations

import io
import json
import marshal
import os
import pickle
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from typing_extensions import TypeIs

from launcher.core.errors import UsageError, describe_error

# Set in the environment of a rank.
RANK_MARK = "LAUNCHER_FUNCTION_RANK"
_REQUEST, _FUNCTION, _FAILURE = "request.json", "function.pkl", "failure.json"


@dataclass(frozen=True, slots=True)
class CallOptions:
    """How a function is run.

    Attributes:
        ranks: number of ranks.
        max_restarts: restarts of all ranks after a failure.
        backend: of the process group that each rank initialises; empty for none.
        modules: what the fork server imports for all ranks.
        path: `sys.path` of the caller.
        arguments: `sys.argv` of the caller.
        sources: the caller's code that is in no file, such as the cells of a notebook: name to lines, for tracebacks.
    """

    ranks: int
    max_restarts: int
    backend: str
    modules: Sequence[str]
    path: Sequence[str]
    arguments: Sequence[str]
    sources: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class CallFailure:
    """The first failure of the last attempt.

    Attributes:
        report: the text for the user.
        is_explained: whether the report is a complete message, without a traceback.
        attempt: restarts before the failure.
    """

    rank: int
    report: str
    is_explained: bool
    attempt: int


class CallFolder:
    """The files of one call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_call(self, options: CallOptions, function: bytes) -> None:
        """The caller's side."""
        self._write(_REQUEST, json.dumps(asdict(options)).encode())
        self._write(_FUNCTION, function)

    def read_options(self) -> CallOptions:
        """The options of the call."""
        return CallOptions(**json.loads((self.path / _REQUEST).read_text(encoding="utf-8")))

    def load_function(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The function and its arguments; imports the modules of the caller that they use."""
        return _load(self.path / _FUNCTION)

    def log(self, rank: int) -> Path:
        """The output of a rank."""
        return self.path / f"rank-{rank}.log"

    def agent_log(self) -> Path:
        """The output of the agent."""
        return self.path / "agent.log"

    def save_result(self, rank: int, result: Any) -> None:
        """Write the result of a rank.

        Raises:
            UsageError: the result cannot be pickled; names the rank and the type.
        """
        try:
            with self._create(_result(rank)) as file:
                make_pickler(file).dump(result)
        except OSError as error:
            raise UsageError(
                f"rank {rank} cannot write its result to {self.path}: {error.strerror or error}; set TMPDIR to a "
                "folder with free space"
            ) from error
        except Exception as error:  # any object may raise anything when it is pickled
            kind = type(result)
            raise UsageError(
                f"rank {rank} returned a {kind.__module__}.{kind.__qualname__} that cannot be pickled "
                f"({describe_error(error)}); make the function return plain values, arrays or tensors instead"
            ) from error

    def discard_result(self, rank: int) -> None:
        """Remove the result of an earlier attempt."""
        (self.path / _result(rank)).unlink(missing_ok=True)

    def has_result(self, rank: int) -> bool:
        """Whether the rank has returned."""
        return (self.path / _result(rank)).exists()

    def load_result(self, rank: int) -> Any:
        """The result of a rank."""
        return _load(self.path / _result(rank))

    def save_error(self, rank: int, attempt: int, error: BaseException) -> None:
        """Write the exception of a rank, without the attributes that cannot be pickled."""
        content = _dump_error(error)
        if content is None:
            content = _dump_error(_find_parts(error))
        if content is not None:
            self._write(_error(rank, attempt), content)

    def load_error(self, rank: int, attempt: int) -> BaseException | None:
        """The exception of a rank; None if it cannot be unpickled."""
        try:
            found = _load(self.path / _error(rank, attempt))
        except Exception:  # noqa: BLE001 -- a class may raise anything; the report has the traceback
            return None
        return found if isinstance(found, BaseException) else None

    def write_failure(self, failure: CallFailure) -> None:
        """The agent's side."""
        self._write(_FAILURE, json.dumps(asdict(failure)).encode())

    def read_failure(self) -> CallFailure | None:
        """The first failure; None if the agent has not reported one."""
        try:
            return CallFailure(**json.loads((self.path / _FAILURE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def _write(self, name: str, content: bytes) -> None:
        with self._create(name) as file:
            file.write(content)

    def _create(self, name: str) -> IO[bytes]:
        return os.fdopen(os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


def make_pickler(file: IO[bytes]) -> pickle.Pickler:
    """A pickler for functions and classes of scripts and notebooks, exceptions of any class, and CUDA tensors."""
    import cloudpickle
    import torch

    class CallPickler(cloudpickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            if isinstance(obj, types.CodeType):
                # cloudpickle leaves out the name of the file, which tracebacks need.
                return marshal.loads, (marshal.dumps(obj),)
            if isinstance(obj, torch.Tensor) and obj.device.type != "cpu":
                moved = obj.detach().cpu()
                if isinstance(obj, torch.nn.Parameter):
                    moved = torch.nn.Parameter(moved, obj.requires_grad)
                return moved.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
            if _has_own_arguments(obj):
                return _make_exception, (type(obj), obj.args, vars(obj))
            return super().reducer_override(obj)

    return CallPickler(file, protocol=pickle.HIGHEST_PROTOCOL)


def _has_own_arguments(value: object) -> TypeIs[BaseException]:
    """Whether an exception's class has an `__init__`, which need not take the exception's `args`."""
    kind = type(value)
    is_exception = isinstance(value, BaseException) and kind.__reduce__ is BaseException.__reduce__
    return is_exception and isinstance(kind.__init__, types.FunctionType)


def _make_exception(kind: type[BaseException], args: tuple[Any, ...], values: dict[str, Any]) -> BaseException:
    """Create an exception without its `__init__`, which may take other arguments than `args`."""
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(values)
    return error


@dataclass(frozen=True, slots=True)
class _ErrorParts:
    """What is pickled in place of an exception that cannot be pickled; becomes an exception again."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    values: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_exception, (self.kind, self.args, self.values)


def _find_parts(error: BaseException) -> _ErrorParts:
    """The class, or the nearest base class that can be pickled, and those arguments and attributes that can."""
    values = {name: value for name, value in vars(error).items() if _dump(value) is not None}
    args = error.args if _dump(error.args) is not None else (_read_text(error),)
    if isinstance(error, BaseExceptionGroup):
        args = (error.message, [each if _dump_error(each) else _find_parts(each) for each in error.exceptions])
    candidates = (_ErrorParts(kind, args, values) for kind in type(error).__mro__ if issubclass(kind, BaseException))
    return next((parts for parts in candidates if _dump_error(parts)), _ErrorParts(Exception, args, {}))


def _dump_error(error: BaseException | _ErrorParts) -> bytes | None:
    """The pickled exception; None if it cannot be restored as an exception with a text."""
    content = _dump(error)
    try:
        restored = None if content is None else pickle.loads(content)  # noqa: S301 -- written just now
        return content if isinstance(restored, BaseException) and isinstance(str(restored), str) else None
    except Exception:  # noqa: BLE001 -- a class may raise anything; the report has the text
        return None


def _dump(value: Any) -> bytes | None:
    stream = io.BytesIO()
    try:
        make_pickler(stream).dump(value)
        pickle.loads(stream.getvalue())  # noqa: S301 -- written just now
    except Exception:  # noqa: BLE001 -- any object may raise anything when it is pickled
        return None
    return stream.getvalue()


def _read_text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 -- a class may raise anything
        return type(error).__name__


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        return pickle.load(file)  # noqa: S301 -- written by a process of the same call, in a private folder


def _result(rank: int) -> str:
    return f"result-{rank}.pkl"


def _error(rank: int, attempt: int) -> str:
    return f"error-{rank}-{attempt}.pkl"
