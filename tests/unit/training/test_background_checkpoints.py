"""The run's checkpoints, written beside steps that change the state in place."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from launcher.checkpoint.atomic_io import AtomicCheckpointIO
from launcher.checkpoint.background import BackgroundWriter
from launcher.checkpoint.manifest import find_problem, read_step
from launcher.checkpoint.reader import Trust, read_file
from launcher.config.schema import CheckpointOptions
from launcher.core.errors import StorageError
from launcher.core.events import EventLog, read_events
from launcher.training.callbacks.events import EventWriter
from launcher.training.callbacks.pending_writes import PendingWrites
from launcher.training.callbacks.run_checkpoint import RunCheckpoint

STEPS, EVERY = 10, 4


class Held(BackgroundWriter):
    """Begins to write when `gate` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def start(self, write: Any) -> None:
        super().start(lambda: (self.gate.wait(60), write()))


class Net(pl.LightningModule):
    """Momentum, batch normalization and a buffer that each step updates in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 300), nn.BatchNorm1d(300), nn.Tanh(), nn.Linear(300, 300), nn.Linear(300, 1)
        )
        self.register_buffer("seen", torch.zeros(40_000))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.get_buffer("seen").add_(1)
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)


class Average(pl.Callback):
    """An exponential average of the weights, updated in place, with a list of Python's own."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.steps: list[int] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = self.weights or [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for own, p in zip(self.weights, pl_module.parameters(), strict=True):
            own.lerp_(p.detach(), 0.1)
        self.steps.append(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights, self.steps = state_dict["weights"], state_dict["steps"]


class OpenGate(pl.Callback):
    """Lets the write begin `after` steps later than the save, and keeps what exists until then."""

    def __init__(self, writer: Held, folder: Path, after: int = 2) -> None:
        self.writer, self.folder, self.after = writer, folder, after
        self.before: list[str] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS - 1:
            self.writer.gate.set()
        elif trainer.global_step % EVERY == self.after:
            self.before.append(" ".join(sorted(path.name for path in self.folder.glob("*.ckpt"))))
            self.writer.gate.set()
        elif trainer.global_step % EVERY == EVERY - 1:
            # The write of the save before may still have to end.
            self.writer.wait()
            self.writer.gate.clear()


def train(folder: Path, writer: BackgroundWriter | None = None, *, resume: Path | None = None, **own: Any) -> Any:
    """Train to the last step; the Trainer, the model and the average."""
    pl.seed_everything(1, verbose=False)
    model, average = Net(), Average()
    checkpoint = RunCheckpoint(CheckpointOptions(every_n_steps=EVERY), folder, writer)
    background = BackgroundWriter() if writer is None else writer
    events = EventWriter(EventLog(folder.parent / f"{folder.name}.jsonl", 0), background.after_write)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=STEPS, logger=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=[AtomicCheckpointIO(Trust(folder), background=writer)],
        callbacks=[PendingWrites(background), average, events, *own.get("callbacks", ()), checkpoint],
    )  # fmt: skip
    # Equal batches: plain Lightning's loops begin the epoch again after a resume.
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(2)).repeat(STEPS, 1)
    trainer.fit(
        model, DataLoader(data, batch_size=16), ckpt_path=None if resume is None else str(resume), weights_only=True
    )  # pyright: ignore[reportArgumentType]
    return trainer, model, average


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _content(path: Path) -> dict[str, Any]:
    content = read_file(path, None)
    for key in [key for key in content["callbacks"] if key.startswith("RunCheckpoint")]:
        del content["callbacks"][key]  # paths
    return content


@pytest.fixture(scope="module")
def waited(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training that waits for its checkpoints: its folder and end."""
    folder = tmp_path_factory.mktemp("waited") / "run"
    kept = Keep(folder)
    return folder.parent / "kept.ckpt", train(folder, callbacks=[kept])


class Keep(pl.Callback):
    """Keeps the checkpoint of the first save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        kept = self.folder.parent / "kept.ckpt"
        if trainer.global_step == EVERY + 3:
            trainer.checkpoint_callbacks[0].best_model_path  # noqa: B018 -- waits for the file
            kept.write_bytes((self.folder / "last.ckpt").read_bytes())


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:You're resuming from a checkpoint that ended")
def test_a_checkpoint_has_the_state_of_its_step_and_a_resume_from_it_is_bit_for_bit(
    tmp_path: Path, waited: Any
) -> None:
    expected_file, (_, model, average) = waited
    folder, writer = tmp_path / "run", Held()
    gate = OpenGate(writer, folder)
    _, written_model, _ = train(folder, writer, callbacks=[gate, Keep(folder)])
    assert gate.before == ["", ""], "two steps ran before the file existed"
    assert _same(dict(written_model.state_dict()), dict(model.state_dict()))
    kept = tmp_path / "kept.ckpt"
    assert _same(_content(kept), _content(expected_file))
    assert (_content(kept)["callbacks"]["Average"]["steps"], _content(kept)["state_dict"]["seen"][0]) == (
        [1, 2, 3, 4],
        4,
    )
    _, resumed, resumed_average = train(folder, resume=kept)
    assert _same(dict(resumed.state_dict()), dict(model.state_dict()))
    assert _same(resumed_average.weights, average.weights)
    assert resumed_average.steps == list(range(1, STEPS + 1))


def test_both_names_are_one_file_and_the_older_one_is_removed_after_it(tmp_path: Path) -> None:
    writer = Held()
    trainer, _, _ = train(tmp_path / "run", writer, callbacks=[OpenGate(writer, tmp_path / "run")])
    last, best = (
        Path(path)
        for path in (trainer.checkpoint_callback.last_model_path, trainer.checkpoint_callback.best_model_path)
    )
    assert (last.name, best.name, last.samefile(best)) == ("last.ckpt", "epoch=0-step=8.ckpt", True)
    assert sorted(path.name for path in (tmp_path / "run").glob("*.ckpt")) == sorted([last.name, best.name])
    assert [find_problem(last), find_problem(best), read_step(last)] == [None, None, 8]
    steps = [event["step"] for event in read_events(tmp_path / "run.jsonl") if event["kind"] == "checkpoint"]
    assert steps == [4, 8]


def test_who_reads_a_path_finds_the_file(tmp_path: Path) -> None:
    found: list[bool] = []

    class Reader(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            path = trainer.checkpoint_callbacks[0].best_model_path
            found.extend([Path(path).exists()] if path else [])

        def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
            found.append((tmp_path / "run" / "last.ckpt").exists())

    train(tmp_path / "run", BackgroundWriter(), callbacks=[Reader()])
    assert len(found) > EVERY
    assert all(found)


def test_a_failed_write_ends_the_training_at_the_next_batch_and_keeps_the_earlier_one(tmp_path: Path) -> None:
    steps: list[int] = []
    folder = tmp_path / "run"

    class Break(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            steps.append(trainer.global_step)
            if trainer.global_step == 2 * EVERY - 1:
                writer.wait()
                (folder / ".epoch=0-step=8.ckpt.tmp").mkdir()
            if trainer.global_step == 2 * EVERY + 1:
                thread = writer._thread  # pyright: ignore[reportPrivateUsage]
                assert thread is not None
                thread.join()

    writer = BackgroundWriter()
    with pytest.raises(IsADirectoryError):
        train(folder, writer, callbacks=[Break()])
    assert steps[-1] == 2 * EVERY + 1
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["epoch=0-step=4.ckpt", "last.ckpt"]
    assert [find_problem(path) for path in folder.glob("*.ckpt")] == [None, None]
    assert [event["step"] for event in read_events(tmp_path / "run.jsonl") if event["kind"] == "checkpoint"] == [4]


def test_an_error_of_the_user_waits_for_the_write(tmp_path: Path) -> None:
    writer = Held()

    class Fail(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == EVERY + 1:
                threading.Timer(0.05, writer.gate.set).start()
                raise StorageError("the user's", reason="quota")

    with pytest.raises(StorageError, match="the user's"):
        train(tmp_path / "run", writer, callbacks=[Fail()])
    assert [find_problem(tmp_path / "run" / "last.ckpt"), read_step(tmp_path / "run" / "last.ckpt")] == [None, EVERY]
