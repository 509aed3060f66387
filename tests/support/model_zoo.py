"""Twelve small models with different parameters, optimizers and graphs, to test memory formulas."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from launcher.demo.model import Block, DemoGPT


class Net(pl.LightningModule):
    """A body, a loss and an optimizer, as a LightningModule."""

    def __init__(
        self, body: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer], tokens: bool = False
    ) -> None:
        super().__init__()
        self.body = body
        self._make_optimizer = optimizer
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        if self.tokens:
            return functional.cross_entropy(out.flatten(0, 1).float(), y.flatten())
        return ((out - y) ** 2).float().mean()

    def configure_optimizers(self) -> Any:
        return self._make_optimizer(self)


class TiedGPT(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self, vocabulary: int = 211, width: int = 36, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, 4, 0.0) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(ids)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(13, 29, batch_first=True)
        self.head = nn.Linear(29, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class LowRank(nn.Module):
    """A frozen weight and a trained correction of low rank (Hu et al. 2021)."""

    def __init__(self, width: int = 128, rank: int = 3) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _frozen() -> nn.Module:
    body = mlp(40, 300, 300, 8)
    body[0].requires_grad_(False)
    return body


def _convolutions() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 13, 3), nn.GroupNorm(1, 13), nn.ReLU(), nn.Conv2d(13, 7, 3), nn.ReLU(),
                        nn.Flatten(), nn.Linear(7 * 8 * 8, 4))  # fmt: skip
    # Buffers with floating-point numbers and integers.
    net.register_buffer("mean", torch.zeros(13))
    net.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    return net


def two_groups(module: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-3)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def _sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-3)


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)


def _amsgrad(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=1e-3, amsgrad=True)


def rmsprop(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(module.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Entry:
    """One model and its input: `shape` without the batch; a vocabulary's size for tokens."""

    make: Callable[[], pl.LightningModule]
    shape: tuple[int, ...]
    out: tuple[int, ...]
    vocabulary: int | None = None

    def batch(self, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        if self.vocabulary is not None:
            ids = torch.randint(self.vocabulary, (size, *self.shape), generator=generator)
            return ids, ids.clone()
        x = torch.randn(size, *self.shape, generator=generator)
        return x.to(dtype), torch.zeros(size, *self.out, dtype=dtype)


MODELS: dict[str, Entry] = {
    "mlp": Entry(lambda: Net(mlp(64, 512, 512, 8), adamw), (64,), (8,)),
    "odd": Entry(lambda: Net(mlp(33, 57, 401, 301, 3), adamw), (33,), (3,)),
    "tiny": Entry(lambda: Net(mlp(1, 1), adamw), (1,), (1,)),
    "tied": Entry(lambda: Net(TiedGPT(), adamw, tokens=True), (12,), (), 211),
    "gpt": Entry(lambda: Net(_gpt(), two_groups, tokens=True), (16,), (), 97),
    "frozen": Entry(lambda: Net(_frozen(), adamw), (40,), (8,)),
    "low_rank": Entry(lambda: Net(LowRank(), adamw), (128,), (128,)),
    "conv": Entry(lambda: Net(_convolutions(), momentum), (3, 12, 12), (4,)),
    "lstm": Entry(lambda: Net(Recurrent(), rmsprop), (6, 13), (5,)),
    "sgd": Entry(lambda: Net(mlp(31, 500, 7), _sgd), (31,), (7,)),
    "amsgrad": Entry(lambda: Net(mlp(50, 350, 350, 2), _amsgrad), (50,), (2,)),
    "large": Entry(lambda: Net(mlp(257, 1031, 1031, 17), two_groups), (257,), (17,)),
}


def _gpt() -> nn.Module:
    return DemoGPT(block_size=16, n_layer=2, n_head=4, n_embd=48)
