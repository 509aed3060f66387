"""What else a checkpoint of a sharded training may contain, on the ranks of `tests.support.sharded_ranks`."""

from __future__ import annotations

import resource
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from launcher.checkpoint.manifest import find_problem
from launcher.checkpoint.sharded import read_sharded
from launcher.core.errors import LauncherError
from strategies.base import RankLocation, StrategyError
from strategies.environment import FixedClusterEnvironment
from strategies.sharded_meta import write_meta
from strategies.sharded_metadata import META
from tests.support.sharded_programs import Model, data, fit, saved


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
        return {"average": self.average, "in lists": [{"one": [next(iter(self.average.values()))]}, 3]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded, self.average = state, dict(state["average"])


class Extra(Model):
    """Saves a parameter, a value of its own in the state dict, and a network among its hyperparameters."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net
        self.extra: dict[str, Any] = {"text": "kept", 7: "number", "empty": {}}
        self.loaded: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
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
    for one, other in (("fsdp2", "fsdp2"), ("fsdp2", "ddp")):
        kept, again = Averages(), Averages()
        here = folder / f"averages-{other}"
        fit(Model(), one, here, callbacks=[kept], steps=3)
        expected = {name: _whole(value) for name, value in kept.average.items()}
        fit(Model(), other, here / "again", saved(here), callbacks=[again], steps=3)
        assert again.loaded is not None
        loaded = again.loaded
        found[other] = {
            "equal": all(torch.equal(_whole(loaded["average"][name]), value) for name, value in expected.items()),
            "sharded": {isinstance(value, DTensor) for value in loaded["average"].values()} == {other == "fsdp2"},
            "in lists": torch.equal(_whole(loaded["in lists"][0]["one"][0]), next(iter(expected.values()))),
            "rest": loaded["in lists"][1],
        }
    return found


def extras(folder: Path) -> dict[str, Any]:
    whole, again = Extra(nn.Linear(5, 3)), Extra(nn.Linear(5, 3))
    fit(whole, "fsdp2", folder, steps=3)
    kept = whole.embed.weight.full_tensor().tolist()
    again.extra = {}
    fit(again, "fsdp2", folder / "again", saved(folder), steps=3)
    one = read_sharded(saved(folder))
    trusted = torch.load(saved(folder) / META, weights_only=False)["hyper_parameters"]["net"]
    return {
        "kept": again.loaded.full_tensor().tolist() == kept == one["kept"].tolist(),
        "extra": [again.extra == whole.extra, one["state_dict"]["_extra_state"] == whole.extra],
        "hyperparameters": [repr(one["hyper_parameters"]["net"]), repr(trusted), trusted.weight.device.type],
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


# Each to itself and, both ways, to two others.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")
CHANGES = [(one, PRECISIONS[(n + step) % 5]) for n, one in enumerate(PRECISIONS) for step in (-1, 0, 1)]


def precisions(folder: Path) -> dict[str, Any]:
    """Resumes in another precision; the same one equals the uninterrupted training."""
    found: dict[str, Any] = {}
    wholes: dict[str, Model] = {}
    for one in PRECISIONS:
        wholes[one] = Model("momentum")
        fit(wholes[one], "fsdp2", folder / one, precision=one)
    for one, other in CHANGES:
        model = Model("momentum")
        strategy = "fsdp2" if one == other else "hsdp"
        fit(model, strategy, folder / f"{one}-{other}", saved(folder / one), precision=other)
        distance = max(abs(wholes[one].losses[n] - loss) for n, loss in model.losses.items())
        found[f"{one} {other}"] = [sorted(model.losses), distance, str(model.embed.weight.dtype)]
    return found


class Scale(pl.Callback):
    """Keeps the loss scale with which a training starts, and the steps since its last change."""

    start: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = scale_of(trainer)


def scale_of(trainer: Any) -> Any:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        state = scaler.state_dict()
        return [state["scale"], state["_growth_tracker"]]
    own = trainer.strategy.deepspeed_engine.optimizer.loss_scaler
    return [own.cur_scale, own.cur_iter - own.last_overflow_iter - 1]


def scales(folder: Path) -> dict[str, Any]:
    """The loss scale is restored from one strategy by another one."""
    found: dict[str, Any] = {}
    zero = [(f"deepspeed_stage_{stage}", "fsdp2") for stage in (2, 3)]
    for one, other in (("ddp", "fsdp2"), ("fsdp2", "ddp"), ("fsdp2", "hsdp"), *zero, *((b, a) for a, b in zero)):
        here, scale = folder / f"{one}-{other}", Scale()
        trainer = fit(Model(), one, here, precision="16-mixed", steps=3)
        saved_scale = scale_of(trainer)
        fit(Model(), other, here / "again", saved(here), precision="16-mixed", callbacks=[scale])
        found[f"{one} {other}"] = [scale.start, saved_scale]
    return found


class Wrapped(Model):
    """Shards itself, as plain Lightning's strategy needs."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)


def plainly(folder: Path, kind: type[Model], resume: Path | None, steps: int, **options: Any) -> Model:
    """Train with plain Lightning's strategy, without the launcher."""
    pl.seed_everything(7, workers=True, verbose=False)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    strategy = ModelParallelStrategy(ranks, 1, **options)
    strategy.cluster_environment = FixedClusterEnvironment(RankLocation(rank, ranks, rank, ranks, 0, "127.0.0.1", 0))
    model = kind("adamw")
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, "saved-{step}", save_top_k=-1, every_n_train_steps=3)], max_steps=steps,
        strategy=strategy, use_distributed_sampler=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, data(4 // ranks, is_same=True), ckpt_path=None if resume is None else str(resume))
    return model


def lightning(folder: Path) -> dict[str, Any]:
    """Plain Lightning resumes from our folder, and we from its folder and its file."""
    found: dict[str, Any] = {}
    whole = plainly(folder / "whole", Wrapped, None, 6)
    again = Model("adamw")
    fit(again, "fsdp2", folder / "ours", saved(folder / "whole"), is_same=True)
    found["ours from its folder"] = [list(again.losses.items()), list(whole.losses.items())]
    plainly(folder / "file", Wrapped, None, 3, save_distributed_checkpoint=False)
    again = Model("adamw")
    fit(again, "fsdp2", folder / "ours from file", saved(folder / "file"), is_same=True)
    found["ours from its file"] = [list(again.losses.items()), list(whole.losses.items())]
    first = Model("adamw")
    fit(first, "fsdp2", folder / "first", is_same=True)
    again = plainly(folder / "plain", Wrapped, saved(folder / "first"), 6)
    found["plain from ours"] = [list(again.losses.items()), list(first.losses.items())]
    return found


def contents(folder: Path) -> dict[str, Any]:
    """The results of all checks."""
    made = {}
    for check in (callbacks, extras, objects, failures, names, strictness, precisions, scales, lightning):
        print("check", check.__name__, flush=True)
        made[check.__name__] = check(folder / check.__name__)
        dist.barrier()
    return made
