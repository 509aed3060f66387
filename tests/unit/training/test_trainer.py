"""Plugins, profilers, progress bars and summaries of the user replace the launcher's."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch import callbacks
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from launcher.checkpoint.atomic_io import AtomicCheckpointIO
from launcher.checkpoint.background import BackgroundWriter
from launcher.config.validation import parse_config
from launcher.core.errors import ConfigError
from launcher.core.events import EventLog
from launcher.core.output import RunOutput
from launcher.hardware.topology import Topology
from launcher.planning.plan import make_plan
from launcher.process.rank_status import RankStatusWriter
from launcher.training.callbacks.model_summary import ShortModelSummary
from launcher.training.callbacks.progress import ProgressLines
from launcher.training.callbacks.progress_bar import TerminalProgress
from launcher.training.callbacks.run_checkpoint import RunCheckpoint
from launcher.training.context import RunContext
from launcher.training.trainer import build_trainer
from launcher.user_code.classes import import_classes
from launcher.user_code.objects import UserObjects, sort_plugins
from tests.support.rank_threads import CPU, ranks

_RANK_ONE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "1", "GROUP_RANK": "0"}  # fmt: skip


@pytest.fixture(autouse=True)
def rank_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning keeps the rank of the last Trainer for the whole process."""
    monkeypatch.setattr(rank_zero_only, "rank", vars(rank_zero_only)["rank"])


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def built(tmp_path: Path, own: list[Any], trainer: dict[str, Any] | None = None, **options: Any) -> Any:
    """A Trainer with the user's callbacks for the rank of `env`, on a terminal or not."""
    env, is_terminal = options.pop("env", {}), options.pop("is_terminal", False)
    topology = Topology.from_env(env, "here")
    size = topology.world_size
    strategy = "ddp" if size > 1 else "single_device"
    plan = make_plan(parse_config({"strategy": strategy, "precision": "32-true"}), ranks(*[CPU] * size))
    run: Any = SimpleNamespace(path=tmp_path, checkpoints=tmp_path, resume_from=None)
    screen = Screen() if is_terminal else io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, _environ={"TERM": "xterm"})
    output = RunOutput(EventLog(tmp_path / "events.jsonl", topology.rank), console, False)
    config = parse_config({"trainer": trainer or {}, "checkpoint": options.get("checkpoint", {})})
    ctx = RunContext(config, topology, plan, run, None, "0", output, RankStatusWriter.from_env({}))
    objects = UserObjects(
        pl.LightningModule(), plugins=options.get("own_plugins", ()), profiler=options.get("own_profiler")
    )
    return build_trainer(ctx, objects, own, [], background=options.get("background"))


def kept(trainer: pl.Trainer, *kinds: Any) -> list[Any]:
    return [each for each in vars(trainer)["callbacks"] if isinstance(each, kinds)]


@pytest.mark.parametrize(("env", "is_terminal"), list(itertools.product([{}, _RANK_ONE], [False, True])))
@pytest.mark.parametrize("bar", [callbacks.RichProgressBar, callbacks.TQDMProgressBar])
def test_user_progress_bar_is_the_only_one(tmp_path: Path, env: dict[str, str], is_terminal: bool, bar: Any) -> None:
    own = bar()
    trainer = built(tmp_path, [own], env=env, is_terminal=is_terminal)
    assert kept(trainer, callbacks.ProgressBar, ProgressLines) == [own]


def test_rank_zero_has_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path: Path) -> None:
    found = {(place, rank): [type(each) for each in kept(built(tmp_path, [], env=env, is_terminal=place),
                                                         callbacks.ProgressBar, ProgressLines)]
             for place in (False, True) for rank, env in enumerate([{}, _RANK_ONE])}  # fmt: skip
    assert found == {(False, 0): [ProgressLines], (False, 1): [], (True, 0): [TerminalProgress], (True, 1): []}


@pytest.mark.parametrize(("restarts", "expected"), [("0", [ShortModelSummary]), ("1", [])])
def test_a_restart_does_not_repeat_the_model_summary(tmp_path: Path, restarts: str, expected: list[Any]) -> None:
    trainer = built(tmp_path, [], env={**_RANK_ONE, "TORCHELASTIC_RESTART_COUNT": restarts})
    assert [type(each) for each in kept(trainer, callbacks.ModelSummary)] == expected


@pytest.mark.parametrize("summary", [callbacks.ModelSummary, callbacks.RichModelSummary])
def test_user_model_summary_is_the_only_one(tmp_path: Path, summary: Any) -> None:
    own = summary(3)
    assert kept(built(tmp_path, [own]), callbacks.ModelSummary) == [own]


def test_user_checkpoint_io_replaces_or_wraps_the_default(tmp_path: Path) -> None:
    own, around = TorchCheckpointIO(), AsyncCheckpointIO()
    assert built(tmp_path, [], own_plugins=[own]).strategy.checkpoint_io is own
    assert built(tmp_path, [], own_plugins=[around]).strategy.checkpoint_io is around
    assert isinstance(around.checkpoint_io, AtomicCheckpointIO)
    complete = AsyncCheckpointIO(own)
    built(tmp_path, [], own_plugins=[complete])
    assert complete.checkpoint_io is own
    assert isinstance(built(tmp_path, []).strategy.checkpoint_io, AtomicCheckpointIO)


def test_profiler_is_an_object_or_a_name(tmp_path: Path) -> None:
    own = SimpleProfiler()
    assert built(tmp_path, [], {"profiler": "advanced"}, own_profiler=own).profiler is own
    assert type(built(tmp_path, [], {"profiler": "simple"}).profiler) is SimpleProfiler


def test_unsupported_and_duplicate_plugins_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"plugins\[1\]: given a LightningEnvironment; expected a precision"):
        sort_plugins([TorchCheckpointIO(), LightningEnvironment()])
    with pytest.raises(ConfigError, match="plugins: given 2 CheckpointIO plugins; a run has one way to save"):
        sort_plugins([TorchCheckpointIO(), AsyncCheckpointIO()])
    model = {"class_path": "tests.support.toy.Toy"}
    twice = {"plugins": [{"class_path": "lightning.pytorch.plugins.TorchCheckpointIO"}] * 2}
    with pytest.raises(ConfigError, match=r"trainer\.plugins: given 2 CheckpointIO plugins"):
        import_classes(parse_config({"model": model, "trainer": twice}))


@pytest.mark.parametrize(
    ("requested", "plugins", "is_used", "notices"),
    [
        ("auto", [], True, 0),
        (True, [], True, 0),
        (False, [], False, 0),
        ("auto", [TorchCheckpointIO()], False, 0),
        (True, [TorchCheckpointIO()], False, 1),
    ],
)
def test_checkpoints_are_written_in_the_background_where_that_is_safe(
    tmp_path: Path, requested: Any, plugins: list[Any], is_used: bool, notices: int
) -> None:
    given: list[str] = []
    writer = BackgroundWriter(given.append)
    options = {"background": writer, "own_plugins": plugins, "checkpoint": {"background": requested}}
    (checkpoint,) = kept(built(tmp_path, [], **options), RunCheckpoint)
    assert vars(checkpoint)["_background"] is (writer if is_used else None)
    assert len(given) == notices
    assert all("a CheckpointIO plugin of the user writes them" in text for text in given)


def test_an_interval_is_chosen_only_on_request(tmp_path: Path) -> None:
    schedules = [
        vars(kept(built(tmp_path, [], checkpoint=checkpoint), RunCheckpoint)[0])["_schedule"]
        for checkpoint in ({}, {"every_n_steps": 3}, {"every": "auto"})
    ]
    assert [schedule is None for schedule in schedules] == [True, True, False]
