"""Exit code 2 means that nothing was trained: an error of the request that comes later is a failed training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.core.errors import LateUsageError, Problem, UsageError
from launcher.core.python_terms import to_python_error
from launcher.process.rank_status import RankError
from launcher.training.failures import late_usage_boundary
from strategies.choice import StrategyError


def _list_kinds(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _list_kinds(each)


KINDS = [*_list_kinds(UsageError), StrategyError]


def _raise(kind: type[Exception], folder: Path, *, has_trained: bool) -> Exception:
    context: Any = SimpleNamespace(run=SimpleNamespace(checkpoints=folder), topology=SimpleNamespace(rank=1))
    problems: Any = [Problem("trainer.x", "given 1; expected 2")]
    error = kind(problems if hasattr(kind, "what") else "the reason")
    with pytest.raises(Exception) as raised, late_usage_boundary(context, lambda: has_trained):  # noqa: PT011 -- any of them
        raise error
    return raised.value


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_a_failed_training_once_a_batch_was_trained(tmp_path: Path, kind: type[Exception]) -> None:
    error = _raise(kind, tmp_path, has_trained=True)
    assert isinstance(error, LateUsageError)
    assert (error.exit_code, error.rank, error.checkpoint) == (1, 1, None)
    assert "no checkpoint was saved before; correct this" in str(error)
    status = RankError.from_exception(error, 0.0, 4)
    assert (status.kind, status.repeats, status.explained) == ("LateUsageError", True, True)


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_is_changed_before_the_first_batch(tmp_path: Path, kind: type[Exception]) -> None:
    assert type(_raise(kind, tmp_path, has_trained=False)) is kind


def test_the_message_has_the_checkpoint_and_speaks_python_in_a_script(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"")
    error = _raise(UsageError, tmp_path, has_trained=True)
    assert isinstance(error, LateUsageError)
    assert error.checkpoint == str(tmp_path / "last.ckpt")
    assert str(error).endswith("with the same name and --resume auto")
    assert str(to_python_error(error)).endswith('with the same name and train(resume_from_checkpoint="auto")')
