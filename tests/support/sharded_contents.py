"""What else a checkpoint of a sharded training may contain, on the ranks of `tests.support.sharded_ranks`."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from launcher.checkpoint.atomic_io import AtomicCheckpointIO
from launcher.checkpoint.manifest import find_problem
from launcher.checkpoint.reader import Trust
from launcher.checkpoint.sharded import read_sharded
from launcher.core.errors import LauncherError
from launcher.training.resume.convert import convert_checkpoint
from strategies.base import StrategyError
from strategies.sharded_meta import write_meta
from strategies.sharded_metadata import META
from tests.support.sharded_changes import lightning, precisions, scales
from tests.support.sharded_programs import Block, Model, data, fit, loadable, make_strategy, saved, weights


class Averages(pl.Callback):
    """Keeps an average of the weights, which are shards, as users do."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.loaded: dict[str, Any] | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: pl.LightningModule, *_: Any) -> None:
        for name, value in pl_module.named_parameters():
            if name in self.average:
                self.average[name].lerp_(value.detach(), 0.5)
            else:
                self.average[name] = value.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        values = list(self.average.values())
        return {"average": self.average, "by position": values, "in lists": [{"one": values[:1]}, 3]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state
        self.average = {name: value.clone() for name, value in state["average"].items()}


class Called(Block):
    def encode(self, x: Tensor) -> Tensor:
        return self.up(x)


class Extra(Model):
    """Saves a parameter, a value of its own in the state dict, and a network among its hyperparameters."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net
        self.extra: dict[str, Any] = {"text": "kept", 7: "number", "empty": {}}
        self.loaded: Any = None
        # Each rank has its own values after a step.
        self.means = nn.ModuleList(nn.BatchNorm1d(64, affine=False) for _ in range(4))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        for each in self.means:
            each(torch.rand(2, 64) + self.global_rank)
        return loss if self.net is None else loss + 0 * self.net(self.embed.weight).sum()

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["kept"] = self.embed.weight

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint["kept"]


class Adapter(Model):
    """Saves only what it trains, as adapters of large models do."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("blocks" in name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "blocks" in name}


class Renamed(Model):
    """Has other names in its checkpoints than in memory."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"old.{name}": value for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        named = {name.removeprefix("old."): value for name, value in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = named


class RenamedInside(Model):
    """Has other names in its state dict, as a wrapped network."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"inner.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        named = {name.removeprefix("inner."): value for name, value in state_dict.items()}
        return super().load_state_dict(named, *args, **kwargs)


def _same(whole: Model, again: Model) -> bool:
    """Whether the losses after the resume are the same."""
    return bool(again.losses) and all(abs(whole.losses[n] - loss) < 1e-5 for n, loss in again.losses.items())


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def callbacks(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one, other in (("fsdp2", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "fsdp2")):
        kept, again = Averages(), Averages()
        here = folder / f"averages-{one}-{other}"
        fit(Model(), one, here, callbacks=[kept], steps=3)
        expected = {name: _whole(value) for name, value in kept.average.items()}
        # The average is continued.
        fit(Model(), other, here / "again", saved(here), callbacks=[again], steps=4)
        assert again.loaded is not None
        loaded = again.loaded
        found[f"{one} {other}"] = {
            "equal": all(torch.equal(_whole(loaded["average"][name]), value) for name, value in expected.items()),
            "sharded": {isinstance(value, DTensor) for value in loaded["average"].values()} == {other == "fsdp2"},
            "by position": {isinstance(value, DTensor) for value in loaded["by position"]} == {other == "fsdp2"},
            "in lists": torch.equal(_whole(loaded["in lists"][0]["one"][0]), next(iter(expected.values()))),
            "rest": loaded["in lists"][1],
        }
    return found


def is_loaded_by_lightning(path: Path, folder: Path, whole: Extra) -> bool:
    """Whether plain Lightning makes the model, with its module among the hyperparameters, of a converted folder."""
    expected = weights(whole)
    if dist.get_rank() == 0:
        convert_checkpoint(path, folder / "one.ckpt", "lightning", trusted=True)
    dist.barrier()
    found = Extra.load_from_checkpoint(folder / "one.ckpt", weights_only=False, map_location="cpu")
    loaded = weights(found)
    # Each rank has buffers of its own.
    return all(loaded[name] == expected[name] for name, _ in found.named_parameters())


def extras(folder: Path) -> dict[str, Any]:
    # Sharded as blocks, and with methods that gather their weights.
    whole, again = (Extra(nn.Sequential(Called(5), Called(5))) for _ in range(2))
    fit(whole, "fsdp2", folder, steps=3)
    kept = whole.embed.weight.full_tensor().tolist()
    again.extra = {}
    fit(again, "fsdp2", folder / "again", saved(folder), steps=3)
    one = read_sharded(saved(folder))
    names = [name for name, _ in whole.means.named_buffers(prefix="means")]
    buffers = [(one["state_dict"][name], whole.trainer.strategy.broadcast(whole.get_buffer(name))) for name in names]
    trusted = torch.load(saved(folder) / META, weights_only=False)["hyper_parameters"]["net"]
    return {
        "kept": again.loaded.full_tensor().tolist() == kept == one["kept"].tolist(),
        "buffers": [torch.equal(*pair) for pair in buffers],
        "extra": [again.extra == whole.extra, one["state_dict"]["_extra_state"] == whole.extra],
        "hyperparameters": [
            repr(one["hyper_parameters"]["net"]),
            [(type(block).__name__, sorted(vars(block)) == sorted(vars(Called(5)))) for block in trusted],
            sorted({str(p.device) for p in trusted.parameters()}),
            is_loaded_by_lightning(saved(folder), folder, whole),
        ],
    }


def names(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in (Adapter, Renamed, RenamedInside):
        for one, others in (("fsdp2", ("fsdp2", "ddp")), ("ddp", ("fsdp2",))):
            whole, here = kind(), folder / f"{kind.__name__}-{one}"
            fit(whole, one, here)
            for other in others:
                again = kind()
                fit(again, other, here / other, saved(here))
                found[f"{kind.__name__} {one} {other}"] = _same(whole, again)
    return found


def strictness(folder: Path) -> dict[str, Any]:
    """A model with one more layer, from a folder and from a file."""

    class More(Model):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for name, p in self.named_parameters() if "more" not in name], 0.05)

    found: dict[str, Any] = {}
    for one in ("fsdp2", "ddp"):
        fit(Model(), one, folder / one)
        for strict in (True, False):
            model = More()
            model.strict_loading = strict
            try:
                fit(model, "fsdp2", folder / f"{one}-{strict}", saved(folder / one))
                found[f"{one} {strict}"] = sorted(model.losses)
            except RuntimeError as error:
                found[f"{one} {strict}"] = str(error).splitlines()[0]
    return found


class Predicting(Model):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


def evaluated(folder: Path) -> list[Any]:
    """Predictions from a folder and a file, under FSDP2 and DDP."""
    found: list[Any] = []
    for one in ("fsdp2", "ddp"):
        fit(Model(), one, folder / one)
        for other in ("fsdp2", "ddp"):
            trainer = pl.Trainer(
                accelerator="cpu", devices=dist.get_world_size(), logger=False, enable_progress_bar=False,
                strategy=make_strategy(other, folder), plugins=[AtomicCheckpointIO(Trust(folder))],
                enable_model_summary=False, enable_checkpointing=False,
            )  # fmt: skip
            path = loadable(saved(folder / one), other, None, folder / f"{one}-{other}")
            given: Any = trainer.predict(Predicting(), data(2, is_same=True), ckpt_path=path, weights_only=True)
            found.append(torch.cat(given).tolist())
    return found


class Holder:
    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def objects(folder: Path) -> str:
    """The error if an object of a user's class keeps a shard."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    content = {"mine": Holder(distribute_tensor(torch.zeros(11, 5), mesh, [Shard(0)]))}
    try:
        write_meta(content, folder.with_name(f"meta-{dist.get_rank()}.pt"))
    except StrategyError as error:
        return str(error)
    return "none"


def failures(folder: Path) -> dict[str, Any]:
    """A save that fails on one rank is the same error on both at once, and the checkpoint before is kept."""
    trainer = fit(Model(), "fsdp2", folder, steps=3)
    path, found = folder / "last.ckpt", {}
    trainer.save_checkpoint(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for name, rank in (("part of rank 0", 0), ("part of rank 1", 1), ("object", None)):
        trainer.lightning_module.on_save_checkpoint = lambda content, n=name: (
            content.update(mine=lambda: None) if n == "object" else None
        )
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        try:
            trainer.save_checkpoint(path)
        except LauncherError as error:
            found[name] = [type(error).__name__, str(error)]
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        dist.barrier()
        found[f"{name} kept"] = [find_problem(path), [each.name for each in folder.glob(".*")]]
    return found


class Thawed(Model):
    """Its frozen layer is trained by a callback, in a parameter group that the optimizer does not have at first."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.1)


class Thawing(BaseFinetuning):
    """Unfreezes in the first epoch, as BackboneFinetuning does later."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None: ...

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 0:
            self.unfreeze_and_add_param_group(pl_module.frozen, optimizer)


def finetuned(folder: Path) -> dict[str, Any]:
    """Trainings that continue after the unfreezing: groups, and the difference from the uninterrupted one."""
    found: dict[str, Any] = {}
    for one, other in (("fsdp2", "fsdp2"), ("ddp", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "ddp")):
        whole, again, here = Thawed(), Thawed(), folder / f"{one}-{other}"
        fit(whole, one, here, callbacks=[Thawing()])
        trainer = fit(again, other, here / "again", saved(here), callbacks=[Thawing()])
        distance = max(abs(whole.losses[n] - loss) for n, loss in again.losses.items())
        found[f"{one} {other}"] = [len(trainer.optimizers[0].param_groups), distance]
    return found


def contents(folder: Path) -> dict[str, Any]:
    """The results of all checks."""
    made: dict[str, Any] = {}
    for check in (
        callbacks,
        extras,
        evaluated,
        objects,
        failures,
        names,
        strictness,
        finetuned,
        precisions,
        scales,
        lightning,
    ):
        print("check", check.__name__, flush=True)
        made[check.__name__] = check(folder / check.__name__)
        dist.barrier()
    return made
