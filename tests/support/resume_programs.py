"""Random programs that train, are interrupted, and resume, compared with an uninterrupted run.

Each rank of an open process group runs them; without one, this process is the only rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from launcher.training.callbacks.run_checkpoint import LastCheckpointWriter
from launcher.training.data.order import DataOrder, DataSplit
from launcher.training.loops.fit_loop import use_resumable_loops
from launcher.training.resume.epoch_metrics import EpochMetrics
from launcher.training.resume.partial_epoch import PartialEpochNotices
from launcher.training.resume.plateaus import StepPlateaus
from launcher.training.resume.random_states import RandomStates
from strategies.base import BuildOptions, RankLocation
from strategies.batch import BatchSplit
from strategies.build import build_strategy
from strategies.choice import choose_strategy

SIZE = 26
# The checkpoint from which the second part resumes.
FIRST_PART = "first.ckpt"
EPOCHS = 3


@dataclass(frozen=True)
class Program:
    """One way to train and to interrupt a training.

    Attributes:
        end: how the first part is interrupted; see `_Breaker`.
        at: optimizer step or batch of the interruption.
        limit: a Trainer option that limits an epoch.
        accumulate: batches per optimizer step, or the schedule of a callback.
        loader: key of `LOADERS`.
        validate: Trainer options of the validation; None trains without.
        scheduler: 'none', 'epoch', 'step', or the metric that a plateau scheduler follows.
        every: optimizer steps between checkpoints; None saves only at the end of epochs.
        reload: epochs after which the loaders are reloaded.
        counts_steps: read the number of steps before training, which creates the loaders.
        manual: manual optimization.
        by_steps: the training ends by `max_steps`.
    """

    end: str
    at: int
    limit: tuple[tuple[str, Any], ...] = ()
    accumulate: Any = 1
    loader: str = "plain"
    validate: tuple[tuple[str, Any], ...] | None = ()
    scheduler: str = "none"
    every: int | None = None
    reload: int = 0
    counts_steps: bool = False
    manual: bool = False
    by_steps: bool = False


@dataclass
class Trace:
    """Record of a run by epoch and batch, and by optimizer step."""

    batches: dict[tuple[int, int], Any] = field(default_factory=dict)
    validations: dict[int, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)


class _BrokenOffError(Exception):
    pass


class _Numbers(torch.utils.data.Dataset[Tensor]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index) + 1])


class _Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.tensor([float(n) + 1]) for n in range(SIZE))


class _Own(DataLoader[Any]):
    def __init__(self, must: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)


def _ranks() -> tuple[int, int]:
    """The number of ranks, and this rank."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def _share(batch: int = 4) -> int:
    """This rank's share of a batch that does not depend on the number of ranks."""
    return batch // _ranks()[0]


def _plain(size: int = SIZE, batch: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(_Numbers(size), _share(batch), shuffle=True, **options)


def _distributed() -> DataLoader[Any]:
    ranks, rank = _ranks()
    sampler = DistributedSampler(_Numbers(SIZE), num_replicas=ranks, rank=rank)
    return DataLoader(_Numbers(SIZE), _share(), sampler=sampler)


def _pair() -> dict[str, Any]:
    return {"a": _plain(), "b": _plain(9, 2)}


LOADERS: dict[str, Callable[[], Any]] = {
    "plain": _plain,
    "in order": lambda: DataLoader(_Numbers(SIZE), _share(), drop_last=True),
    "own class": lambda: _Own("must", _Numbers(SIZE), _share(), shuffle=True),
    "weighted": lambda: DataLoader(
        _Numbers(SIZE), _share(), sampler=WeightedRandomSampler([1.0 + n for n in range(SIZE)], 22)
    ),
    "own batches": lambda: DataLoader(
        _Numbers(SIZE), batch_sampler=BatchSampler(RandomSampler(range(SIZE)), _share(), True)
    ),
    "distributed": _distributed,
    "dict": _pair,
    "list": lambda: [*_pair().values()],
    "nested": lambda: {"x": [_plain(9)], "y": _pair()},
    "min_size": lambda: CombinedLoader(_pair(), "min_size"),
    "max_size": lambda: CombinedLoader(_pair(), "max_size"),
    "max_size_cycle": lambda: CombinedLoader(_pair(), "max_size_cycle"),
    "combined in combined": lambda: CombinedLoader([CombinedLoader(_pair(), "max_size_cycle"), _plain()], "min_size"),
    "stream": lambda: DataLoader(_Stream(), _share()),
    "stateful": lambda: StatefulDataLoader(_Numbers(SIZE), _share(), shuffle=True),
    "stateful stream": lambda: StatefulDataLoader(_Stream(), _share()),
    "mixed with a stream": lambda: {"a": _plain(), "b": DataLoader(_Stream(), _share())},
}

# Workers take longer to start than the programs take to train.
WITH_WORKERS: dict[str, Callable[[], Any]] = {
    "persistent workers": lambda: _plain(num_workers=1, persistent_workers=True),
    "combined workers": lambda: CombinedLoader(
        [_plain(num_workers=1, persistent_workers=True), _plain(9, 2, num_workers=1)], "max_size_cycle"
    ),
}
# A resume does not know the position in these.
UNPLACED = ("combined in combined", "stream", "mixed with a stream", "stateful stream")


def _parts(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return [tensor for part in batch for tensor in _parts(part)]
    return []


class _Module(pl.LightningModule):
    def __init__(self, program: Program, trace: Trace) -> None:
        super().__init__()
        self.automatic_optimization = not program.manual
        self.program, self.trace = program, trace
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.2), nn.Linear(4, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        samples = [part.flatten().tolist() for part in _parts(batch)]
        loss = torch.stack([(self.net(part / SIZE) - 1).square().mean() for part in _parts(batch)]).sum()
        optimizer: Any = self.optimizers()
        rates = [group["lr"] for group in optimizer.param_groups]
        self.trace.batches[self.current_epoch, batch_idx] = (samples, self.global_step, rates, float(loss.detach()))
        self.log("train", loss.detach(), on_epoch=True, on_step=False, batch_size=len(samples[0]),
                 sync_dist=_ranks()[0] > 1)  # fmt: skip
        if self.program.manual:
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        return loss

    def on_fit_start(self) -> None:
        # As if a user seeds by rank: only the checkpoint restores these.
        torch.manual_seed(7 + self.global_rank)

    def on_validation_epoch_start(self) -> None:
        self.seen: list[float] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen += batch.flatten().tolist()
        self.log("val", (self.net(batch / SIZE) - 1).square().mean(), sync_dist=_ranks()[0] > 1)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            weights = torch.cat([p.detach().flatten() for p in self.parameters()]).tolist()
            self.trace.validations[self.global_step] = (self.current_epoch, self.seen, weights)

    def configure_optimizers(self) -> Any:
        if self.program.counts_steps:
            self.trace.end["counted"] = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        kind = self.program.scheduler
        if kind == "none":
            return optimizer
        if kind in ("epoch", "step"):
            scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": kind}}
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": kind}}


class _Data(pl.LightningDataModule):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def train_dataloader(self) -> Any:
        return {**LOADERS, **WITH_WORKERS}[self.program.loader]()

    def val_dataloader(self) -> Any:
        return [] if self.program.validate is None else DataLoader(_Numbers(10), _share())


class _Breaker(pl.Callback):
    """Interrupts a run: 'crash' in a step, 'crash in validation', 'save and leave' after a step, 'stop'."""

    def __init__(self, end: str, at: int, checkpoint: Path) -> None:
        self.end, self.at, self.checkpoint = end, at, checkpoint

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.end == "crash" and trainer.fit_loop.total_batch_idx == self.at:
            raise _BrokenOffError

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.end == "crash in validation" and not trainer.sanity_checking and trainer.global_step >= self.at:
            raise _BrokenOffError

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.end == "save and leave" and trainer.global_step >= self.at:
            trainer.save_checkpoint(self.checkpoint)
            raise _BrokenOffError
        if self.end == "stop" and trainer.global_step >= self.at:
            trainer.should_stop = True


def fit_program(
    program: Program,
    folder: Path,
    trace: Trace,
    ckpt: Path | None,
    *,
    breaks: bool,
    whole_steps: int,
    more: Callable[[EpochMetrics], Sequence[pl.Callback]] = lambda metrics: (),
) -> None:
    """Train the program, or the part of it that is interrupted, with `more` callbacks before all others."""
    pl.seed_everything(7, workers=True, verbose=False)
    last = folder / "last.ckpt"
    notify = trace.notices.append
    metrics = EpochMetrics(notify)
    callbacks: list[Any] = [
        *more(metrics),
        RandomStates(notify),
        metrics,
        PartialEpochNotices(notify),
        StepPlateaus(notify),
        LastCheckpointWriter(last),
    ]
    options: dict[str, Any] = {"max_epochs": EPOCHS, **dict(program.limit)}
    if program.by_steps and whole_steps:
        options.update(max_epochs=-1, max_steps=whole_steps)
    if breaks and program.end == "max_epochs":
        options.update(max_epochs=1 + program.at % 2, max_steps=whole_steps or -1)
    elif breaks and program.end == "max_steps":
        options["max_steps"] = min(program.at, whole_steps or program.at)
    elif breaks:
        callbacks.insert(0, _Breaker(program.end, program.at, last))
    if isinstance(program.accumulate, dict):
        callbacks.append(GradientAccumulationScheduler(dict(program.accumulate)))
    else:
        options["accumulate_grad_batches"] = program.accumulate
    if program.validate is not None:
        options.update(program.validate)
        callbacks.append(EarlyStopping("val", patience=50, strict=False))
    callbacks.append(
        ModelCheckpoint(
            folder, "{step}", save_last=True, save_top_k=-1, every_n_train_steps=program.every,
            enable_version_counter=False,
        )
    )  # fmt: skip
    ranks, rank = _ranks()
    if ranks > 1:
        choice = choose_strategy("ddp", world_size=ranks, device_kind="cpu", accumulate=1, model_has_static_graph=False)
        location = RankLocation(rank, ranks, rank, ranks, 0, "127.0.0.1", 0)
        options["strategy"] = build_strategy(choice, BuildOptions("cpu", location, 60))
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, default_root_dir=folder, reload_dataloaders_every_n_epochs=program.reload,
        num_sanity_val_steps=1, **options,
    )  # fmt: skip
    accumulate = 1 if isinstance(program.accumulate, dict) else program.accumulate
    order = DataOrder(DataSplit(BatchSplit(ranks, None, accumulate), rank, seed=7), trace.notices.append)
    use_resumable_loops(trainer, order)
    module = _Module(program, trace)
    trainer.fit(module, datamodule=_Data(program), ckpt_path=None if ckpt is None else str(ckpt), weights_only=True)
    stopping = trainer.early_stopping_callback
    trace.end.update(
        steps=trainer.global_step,
        epochs=trainer.current_epoch,
        weights=[p.tolist() for p in module.parameters()],
        rates=[group["lr"] for group in trainer.optimizers[0].param_groups],
        waits=None if stopping is None else (stopping.wait_count, float(stopping.best_score)),
        schedulers=[config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        stepped=trainer.fit_loop.epoch_loop._batches_that_stepped,
        total=trainer.fit_loop.total_batch_idx,
    )


def play(program: Program, folder: Path) -> tuple[Trace, Trace, Trace]:
    """Records of the uninterrupted run, of both parts of the interrupted one, and of its second part.

    If the first part is not interrupted, it is the complete run, which is then resumed too.
    """
    whole, first, second = Trace(), Trace(), Trace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = whole_steps(program, folder)
        fit_program(program, new_folder(folder / "whole"), whole, None, breaks=False, whole_steps=steps)
        parts = new_folder(folder / "parts")
        with contextlib.suppress(_BrokenOffError):
            fit_program(program, parts, first, None, breaks=True, whole_steps=steps)
        _meet()
        last = parts / "last.ckpt"
        if last.exists() and _ranks()[1] == 0:
            shutil.copyfile(last, folder / FIRST_PART)
        second.notices.clear()
        resumed = last if last.exists() else None
        fit_program(program, parts, second, resumed, breaks=False, whole_steps=steps)
    merged = Trace({**first.batches, **second.batches}, {**first.validations, **second.validations}, second.notices,
                   second.end)  # fmt: skip
    if "steps" in first.end and not second.batches:
        merged.end = first.end  # nothing was left to train
    return whole, merged, second


def whole_steps(program: Program, folder: Path) -> int:
    """The step at which training ends; 0 if the number of epochs decides."""
    if not program.by_steps:
        return 0
    sizing = Trace()
    shorter = dataclasses.replace(program, by_steps=False)
    fit_program(shorter, new_folder(folder / "sizing"), sizing, None, breaks=False, whole_steps=0)
    return max(sizing.end["steps"] - 2, 1)


def differences_on_one_rank(program: Program, folder: Path) -> list[str]:
    """Differences in samples and steps between one rank that resumes the first part of several ranks and a single rank.

    Args:
        program: the program of the ranks.
        folder: the ranks' folder with the checkpoint of the first part.
    """
    whole, second = Trace(), Trace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps, first = whole_steps(program, folder), folder / FIRST_PART
        resumed = first if first.exists() else None
        fit_program(program, new_folder(folder / "one"), whole, None, breaks=False, whole_steps=steps)
        fit_program(program, new_folder(folder / "resumed"), second, resumed, breaks=False, whole_steps=steps)
    kept = {key: value[:2] for key, value in whole.batches.items()}
    resumed = {key: value[:2] for key, value in second.batches.items()}
    found = [f"batch {key}: {kept.get(key)} uninterrupted, {value} resumed" for key, value in resumed.items()
             if kept.get(key) != value]  # fmt: skip
    left = {key for key in kept if resumed and key >= min(resumed)}
    return [*found[:2], *(f"batch {key} is missing" for key in sorted(left - set(resumed))[:2])]


def new_folder(folder: Path) -> Path:
    """An empty folder, which rank zero creates for all."""
    if _ranks()[1] == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    _meet()
    return folder


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def differences(program: Program, folder: Path) -> list[str]:
    """Differences between the resumed run and the uninterrupted one; empty if a notice reported them before."""
    found, notices = compared(program, folder)
    return judged(program, found, notices)


def is_placed(program: Program) -> bool:
    """Whether a resume knows the position in its loaders."""
    overfit_batches = ("overfit_batches", 3) in program.limit and program.loader == "own batches"
    return program.loader not in UNPLACED and not overfit_batches


def judged(program: Program, found: list[str], notices: list[str]) -> list[str]:
    """Errors in the differences that `compared` found and in rank zero's notices."""
    if notices and is_placed(program) and program.accumulate == 1:
        return [f"notice: {text}" for text in notices]
    return [] if notices else found


def compared(program: Program, folder: Path) -> tuple[list[str], list[str]]:
    """The differences, and the notices before the second part."""
    whole, merged, second = play(program, folder)
    found = [f"batch {key}: {whole.batches.get(key)} whole, {merged.batches.get(key)} in parts"
             for key in sorted({*whole.batches, *merged.batches})
             if whole.batches.get(key) != merged.batches.get(key)][:2]  # fmt: skip
    # A run that receives a stop request validates at that step.
    keys = {*whole.validations, *(second.validations if program.end == "stop" else merged.validations)}
    found += [f"validation at step {key}: {whole.validations.get(key)} whole, {merged.validations.get(key)} in parts"
              for key in sorted(keys) if whole.validations.get(key) != merged.validations.get(key)][:2]  # fmt: skip
    # The notice excuses no other difference, and appears only if it is true.
    stopped = [text for text in second.notices if "to end it, Lightning validated once more" in text]
    nothing_left = program.end == "stop" and not second.batches
    ignored = {"waits"} if stopped or nothing_left else set()
    if stopped and program.accumulate == 1 and not set(merged.validations) - set(whole.validations):
        found.append(f"not so: {stopped}")
    found += [f"{key}: {value} whole, {merged.end.get(key)} in parts" for key, value in whole.end.items()
              if merged.end.get(key) != value and key not in ignored]  # fmt: skip
    return found, [text for text in second.notices if text not in stopped]


def random_program(seed: int) -> Program:
    """A random program; combinations that Lightning rejects are replaced."""
    draw = random.Random(seed)  # noqa: S311 -- no secret
    end = draw.choice(["crash", "crash", "crash in validation", "save and leave", "save and leave", "max_steps",
                       "max_epochs", "stop"])  # fmt: skip
    validate: Any = draw.choice([None, (), (), (("val_check_interval", 0.5),), (("val_check_interval", 2),),
                                 (("check_val_every_n_epoch", 2),),
                                 (("val_check_interval", 5), ("check_val_every_n_epoch", None))])  # fmt: skip
    loader = draw.choice(list(LOADERS))
    if loader in ("stream", "mixed with a stream", "stateful stream") and validate and validate[0][1] == 0.5:
        validate = ()
    limit = draw.choice([(), (), (("limit_train_batches", 5),), (("limit_train_batches", 0.7),),
                         (("overfit_batches", 3),)])  # fmt: skip
    if loader in ("stream", "mixed with a stream", "stateful stream"):
        limit = draw.choice([(), (("limit_train_batches", 5),)])
    manual = draw.random() < 0.15
    monitored = ["train"] if validate is None or ("check_val_every_n_epoch", 2) in validate else ["train", "val"]
    if validate and ("check_val_every_n_epoch", None) in validate:
        monitored = ["train"]
    return Program(
        end=end,
        at=draw.randrange(1, 14),
        limit=limit,
        accumulate=1 if manual else draw.choice([1, 1, 2, 3, {0: 1, 1: 2, 2: 3}]),
        loader=loader,
        validate=validate,
        scheduler="none" if manual else draw.choice(["none", "epoch", "step", *monitored]),
        every=draw.choice([None, 1, 2, 3]),
        reload=draw.choice([0, 0, 1, 2]),
        counts_steps=draw.random() < 0.3,
        manual=manual,
        by_steps=draw.random() < 0.25,
    )
