"""Small trainings under the strategies of several ranks, which save in the middle and resume.

Each rank of an open process group runs them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from launcher.checkpoint.atomic_io import AtomicCheckpointIO
from launcher.checkpoint.formats import format_of, format_written_by
from launcher.checkpoint.manifest import write_manifest
from launcher.checkpoint.reader import Trust, guarded_loads
from launcher.checkpoint.storage import explained_saves
from launcher.training.data.order import DataOrder, DataSplit
from launcher.training.loops.fit_loop import use_resumable_loops
from launcher.training.resume.convert import save_private
from strategies.base import BuildOptions, CheckpointHooks, RankLocation
from strategies.batch import BatchSplit
from strategies.build import build_strategy, precision_plugin
from strategies.choice import choose_strategy
from strategies.deepspeed_config import BatchAndClip, zero_config
from strategies.deepspeed_precision import precision_blocks
from strategies.precision import Precision
from strategies.registry import list_zero_variants
from strategies.sharding import ShardOptions

STEPS, SAVED = 6, 3


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 7), nn.Linear(7, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(pl.LightningModule):
    """Tied weights, a frozen layer, a buffer, and rows that no number of ranks divides."""

    count: Tensor

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        # The same initial weights in each training.
        torch.manual_seed(3)
        self.automatic_optimization = optimizer != "two"
        self.kind = optimizer
        self.embed = nn.Embedding(11, 5)
        self.blocks = nn.ModuleList(Block(5) for _ in range(2))
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(3))
        self.losses: dict[int, float] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.frozen(x))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self(batch[0]).float(), batch[1])
        with torch.no_grad():
            self.count += 1
        self.losses[self.trainer.fit_loop.total_batch_idx] = float(loss.detach())
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return None

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.kind](self)


class Descent(torch.optim.Optimizer):
    """Gradient descent; subclasses return what to subtract, times the learning rate, and keep states."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(self.direction(parameter.grad, self.state[parameter]) * group["lr"])
        return loss

    def direction(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class Scalars(Descent):
    """States of one number per parameter: a plain one, a tensor, and the gradient's norm."""

    def direction(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        state["seen"] = state.get("seen", 0) + 1
        state["decay"] = state.get("decay", torch.ones(())) * 0.9
        state["norm"] = grad.norm()
        state["mean"] = state.get("mean", torch.zeros_like(grad)).lerp(grad, 0.5)
        return state["mean"] * float(state["decay"]) / (1 + state["norm"])


class Factored(Descent):
    """Means of the squared gradients by rows and columns, as Adafactor has; torch's does not take DTensors."""

    def direction(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        if grad.dim() != 2:
            return grad
        if not state:
            state["row"], state["column"] = grad.new_zeros(grad.shape[0]), grad.new_zeros(grad.shape[1])
        squared = grad * grad
        state["row"].mul_(0.9).add_(squared.mean(1))
        state["column"].mul_(0.9).add_(squared.mean(0))
        return grad / ((state["row"].unsqueeze(1) + state["column"].unsqueeze(0)).sqrt() + 1e-6)


class Nested(Descent):
    """The last gradients, kept in a list, a tuple and a dict."""

    def direction(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        if not state:
            state |= {"last": [], "flat": [], "by number": {0: torch.zeros_like(grad), 3: (1, {})}}
        state["last"] = [*state["last"], grad.clone()][-2:]
        rows = grad.sum(-1, keepdim=True) if grad.dim() > 1 else grad.clone()
        state["flat"] = [*state["flat"], rows][-2:]
        state["by number"][0].lerp_(grad, 0.5)
        state["pair"] = (grad.clone(), len(state["last"]))
        mean = sum(state["last"][1:], start=state["last"][0] + state["pair"][0] + state["by number"][0])
        return mean + sum(state["flat"])


def _groups(model: Model) -> Any:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [], "lr": 0.5},
        {"params": others, "betas": (0.8, 0.9)},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _two(model: Model) -> Any:
    blocks, rest = model.blocks.parameters(), [model.embed.weight]
    return [torch.optim.SGD(blocks, 0.1, momentum=0.9, nesterov=True), torch.optim.AdamW(rest, 0.05)]


OPTIMIZERS: Mapping[str, Callable[[Model], Any]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 0.05),
    "groups": _groups,
    "momentum": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "plain": lambda model: torch.optim.SGD(model.parameters(), 0.1),
    "factored": lambda model: Factored([p for p in model.parameters() if p.requires_grad], 0.01),
    "scalars": lambda model: Scalars([p for p in model.parameters() if p.requires_grad], 0.1),
    "nested": lambda model: Nested([p for p in model.parameters() if p.requires_grad], 0.02),
    "two": _two,
}


def data(batch: int, *, is_same: bool = False) -> DataLoader[Any]:
    """40 samples, in one order or another, or 40 times the first one."""
    draw = torch.Generator().manual_seed(5)
    samples = torch.randint(0, 11, (2, 40), generator=draw)
    own = samples[:, :1].expand(2, 40) if is_same else samples
    return DataLoader(TensorDataset(*own), batch, shuffle=True)


def hooks(folder: Path) -> CheckpointHooks:
    """The launcher's hooks, without a run."""

    def refused(path: Path) -> Any:
        raise AssertionError(path)

    reading = functools.partial(guarded_loads, trust=Trust(folder))
    return CheckpointHooks(write_manifest, explained_saves, reading, refused)


def deepspeed_config(name: str, precision: str, accumulate: int) -> dict[str, Any] | None:
    variant, ranks = list_zero_variants().get(name), dist.get_world_size()
    if variant is None:
        return None
    batch = BatchAndClip(ranks, 4 // ranks, accumulate, 0.0)
    return {**zero_config(variant, "cpu", batch), **precision_blocks(Precision(precision), {})}


def make_strategy(name: str, folder: Path, deepspeed: Any = None, **sharding: Any) -> Any:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    choice = choose_strategy(name, world_size=ranks, device_kind="cpu", accumulate=1, model_has_static_graph=False)
    options = BuildOptions("cpu", RankLocation(rank, ranks, rank, ranks, 0, "127.0.0.1", 0), 60,
                           sharding=ShardOptions(**sharding), checkpoint=hooks(folder), deepspeed=deepspeed,
                           pretend_fp16=True)  # fmt: skip
    return build_strategy(choice, options)


def fit(
    model: Model,
    strategy: str,
    folder: Path,
    resume: Path | None = None,
    *,
    precision: str = "32-true",
    steps: int = STEPS,
    accumulate: int = 1,
    callbacks: Sequence[pl.Callback] = (),
    is_same: bool = False,
    **sharding: Any,
) -> pl.Trainer:
    """Train to a step, and save in the middle and at the end; see `saved`."""
    pl.seed_everything(7, workers=True, verbose=False)
    plugin = precision_plugin(Precision(precision), "cpu", strategy=strategy)
    deepspeed = deepspeed_config(strategy, precision, accumulate)
    # Lightning counts the steps of all optimizers.
    count = 2 if model.kind == "two" else 1
    keeper = ModelCheckpoint(folder, "saved-{step}", save_top_k=-1, every_n_train_steps=SAVED * count)
    ranks = dist.get_world_size()
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks, keeper], default_root_dir=folder, max_steps=steps * count, max_epochs=-1,
        strategy=make_strategy(strategy, folder, deepspeed, **sharding), accumulate_grad_batches=accumulate,
        plugins=[AtomicCheckpointIO(Trust(folder), maps_files=True), *([] if plugin is None else [plugin])],
        **({} if plugin is not None else {"precision": precision}),
    )  # fmt: skip
    split = DataSplit(BatchSplit(ranks, None, accumulate), dist.get_rank(), seed=7)
    use_resumable_loops(trainer, DataOrder(split, print))
    start = None if resume is None else loadable(resume, strategy, deepspeed, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, data(4 // ranks, is_same=is_same), ckpt_path=start, weights_only=True)
    return trainer


def loadable(path: Path, strategy: str, deepspeed: Any, folder: Path) -> str:
    """The checkpoint, or one file with its content, as the launcher resumes."""
    found = format_of(path)
    if found.is_loadable(path, format_written_by(strategy), deepspeed, dist.get_world_size()):
        return str(path)
    target = folder.with_name(f"{folder.name}.one")
    if dist.get_rank() == 0:
        save_private(found.read_consolidated(path), target)
    dist.barrier()
    return str(target)


def saved(folder: Path) -> Path:
    """The checkpoint of the middle of a training."""
    return min(folder.glob("saved-*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]))


def weights(model: nn.Module) -> dict[str, Any]:
    """Complete weights; a collective."""
    found = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {name: getattr(value, "full_tensor", lambda v=value: v)().float().tolist() for name, value in found.items()}
