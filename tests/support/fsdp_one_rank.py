"""FSDP2 on one device: trains a small GPT with the strategy's object and writes what was seen.

`python -m tests.support.fsdp_one_rank DEVICE OUT [CASE ...]`, with DEVICE `cuda` or `cpu`. One rank shards nothing, but
its gathers, casts, hooks and checkpoints are those of several ranks.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from launcher.training.callbacks.activation_checkpointing import ActivationCheckpointing
from strategies.base import BuildOptions, RankLocation, StrategyChoice
from strategies.memory import estimate_memory
from strategies.precision import Precision
from strategies.registry import find_strategy
from strategies.sharding import DEFAULT_SHARDING, ShardOptions
from strategies.step_trace import ModelProfile, at_batch_size

STEPS = 10
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    vocabulary: int
    length: int
    batch: int


# States of 168 million parameters are large beside the workspaces of cuBLAS.
SIZES = {"cuda": Size(1024, 12, 16384, 512, 8), "cpu": Size(16, 2, 32, 8, 4)}


class Layer(nn.Module):
    calls: ClassVar[int] = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        Layer.calls += 1
        heads = (t.unflatten(2, (4, -1)).transpose(1, 2) for t in self.mix(self.first(x)).chunk(3, 2))
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class Gpt(pl.LightningModule):
    """Every batch is the same, so that the order of the data does not matter."""

    def __init__(self, size: Size, *, on_meta: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size, self.losses = size, list[float]()
        with torch.device("meta") if on_meta else nullcontext():
            self.embed = nn.Embedding(size.vocabulary, size.width)
            self.layers = nn.ModuleList(Layer(size.width) for _ in range(size.layers))
            self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens = batch[0]
        logits = self(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        self.losses.append(loss.detach().item() if not loss.is_meta and type(loss) is Tensor else 0.0)
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(make_batch(self.size).repeat(100, 1)), batch_size=self.size.batch)


def make_batch(size: Size) -> Tensor:
    return torch.randint(0, size.vocabulary, (size.batch, size.length + 1), generator=torch.Generator().manual_seed(1))


class Watch(pl.Callback):
    """The peak of memory in the training, and the seconds of the optimizer's step with and without `foreach`."""

    def __init__(self, *, is_timed: bool) -> None:
        self._is_timed = is_timed
        self.peak: int | None = None
        self.foreach: list[bool | None] = []
        self.seconds: list[float] = []
        self.types: list[str] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.types = sorted({f"{type(p).__name__} {p.device.type} {p.dtype}" for p in pl_module.parameters()})
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        optimizer = trainer.optimizers[0]
        self.foreach = [group["foreach"] for group in optimizer.param_groups]
        for chosen in (True, False) if self._is_timed else ():
            for group in optimizer.param_groups:
                group["foreach"] = chosen
            self.seconds.append(_seconds_of(optimizer.step))


def _seconds_of(step: Callable[[], Any]) -> float:
    """The shortest of several calls, with the device's work."""
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found)


@dataclass
class OneRank:
    device: str
    folder: Path
    seen: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> Size:
        return SIZES[self.device]

    def train(
        self,
        name: str,
        precision: str,
        *,
        sharding: ShardOptions = DEFAULT_SHARDING,
        steps: int = STEPS,
        on_meta: bool = False,
        resume: Path | None = None,
        save: Path | None = None,
    ) -> dict[str, Any]:
        """Train a new model; `single_device` is the reference. The timed steps are after the last loss."""
        is_timed = save is None and precision == "32-true"
        model, watch, entry = Gpt(self.size, on_meta=on_meta), Watch(is_timed=is_timed), find_strategy(name)
        plugin = entry.precision_plugin(Precision(precision), self.device, 1.0)
        trainer = pl.Trainer(
            accelerator="gpu" if self.device == "cuda" else "cpu",
            devices=1,
            strategy="auto" if name == "single_device" else self.build(name, sharding),
            **({"precision": precision} if plugin is None else {"plugins": [plugin]}),
            max_steps=steps,
            callbacks=[watch, *([ActivationCheckpointing(())] if sharding.checkpoint_activations else [])],
            logger=False,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        Layer.calls = 0
        trainer.fit(model, ckpt_path=resume, weights_only=True if resume else None)
        if save is not None:
            trainer.save_checkpoint(save)
        scaler: Any = getattr(plugin, "scaler", None)
        return {"losses": model.losses, "peak": watch.peak, "foreach": watch.foreach, "seconds": watch.seconds,
                "types": watch.types, "calls": Layer.calls,
                "scale": None if scaler is None else scaler.get_scale()}  # fmt: skip

    def build(self, name: str, sharding: ShardOptions) -> Any:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        location = RankLocation(0, 1, 0, 1, 0, "127.0.0.1", port)
        choice = StrategyChoice(name, (), backend="nccl" if self.device == "cuda" else "gloo")
        return find_strategy(name).build(choice, BuildOptions(self.device, location, 60.0, sharding=sharding))

    def estimate(self, name: str, precision: str, sharding: ShardOptions = DEFAULT_SHARDING) -> int:
        """The plan's peak for one rank."""
        from launcher.planning.profile import TraceTarget, trace_profile
        from strategies.trace import PlannedTrainer

        trainer = PlannedTrainer(1, 1, STEPS)
        batch, planned = [make_batch(self.size)], Precision(precision)
        target = TraceTarget(self.device, checkpoint_activations=sharding.checkpoint_activations)
        profile = trace_profile(lambda: Gpt(self.size), batch, planned, trainer, target)
        assert isinstance(profile, ModelProfile)
        entry = find_strategy(name)
        trace = at_batch_size(*entry.traces(profile), self.size.batch)
        return estimate_memory(profile.model, trace, entry, 1, planned, method="traced", sharding=sharding).total

    def precisions(self) -> None:
        """Each precision and variant, with the reference and the plan."""
        names = ("fsdp2", "fsdp2_grad_op", *(("fsdp2_offload",) if self.device == "cuda" else ()))
        for precision in PRECISIONS:
            self.seen[f"single_device {precision}"] = self.train("single_device", precision)
            for name in names:
                found = self.train(name, precision)
                self.seen[f"{name} {precision}"] = {**found, "estimate": self.estimate(name, precision)}

    def options(self) -> None:
        """Activation checkpointing, and a model that is made on the meta device."""
        sharding = ShardOptions(checkpoint_activations=True)
        found = self.train("fsdp2", "bf16-mixed", sharding=sharding)
        self.seen["checkpointed"] = {**found, "estimate": self.estimate("fsdp2", "bf16-mixed", sharding)}
        self.seen["meta"] = self.train("fsdp2", "32-true", on_meta=True)

    def resume(self) -> None:
        """A training in two parts."""
        for precision in ("32-true", "16-mixed"):
            path = self.folder / f"{precision}.ckpt"
            first = self.train("fsdp2", precision, steps=STEPS // 2, save=path)
            second = self.train("fsdp2", precision, resume=path)
            self.seen[f"resumed {precision}"] = {**second, "losses": [*first["losses"], *second["losses"]]}


def main(device: str, out: Path, *cases: str) -> None:
    one = OneRank(device, out.parent)
    try:
        for case in cases or ("precisions", "options", "resume"):
            getattr(one, case)()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    out.write_text(json.dumps(one.seen))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
