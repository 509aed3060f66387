"""Modules as users write them: their layers and inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- as everybody writes it
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import BinaryAccuracy

from tests.compatibility.modules import Plain


class BatchNorm(Plain):
    def make(self, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 1))


class Conv(Plain):
    def make(self, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, hidden, 3), nn.GroupNorm(2, hidden), nn.GELU(),
                             nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(hidden, 1))  # fmt: skip


class Attention(Plain):
    def make(self, hidden: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(hidden, 2, 16, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Linear(1, hidden), encoder, nn.Flatten(),
                             nn.Linear(8 * hidden, 1))  # fmt: skip


class Dropout(Plain):
    """Draws random numbers in its forward pass."""

    def make(self, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, hidden), nn.Dropout(0.3), nn.Linear(hidden, 1))


class Classifier(Plain):
    """torchmetrics as attributes, logged as objects, and a collection."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = BinaryAccuracy()
        self.several = MetricCollection({"mse": MeanSquaredError()}, prefix="val_")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        found = self(x)
        self.accuracy(found, (y > 0).long())
        self.log("acc", self.accuracy, on_step=False, on_epoch=True)
        return F.binary_cross_entropy_with_logits(found, (y > 0).float())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.several.update(self(x), y)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.several.compute())
        self.several.reset()


class TwoLoaders(Plain):
    """`validation_step` of several loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.loss(batch))
        self.log(f"own_{dataloader_idx}", self.loss(batch), add_dataloader_idx=False)


class TiedLstm(Plain):
    """Tied embeddings over padded sequences of different lengths, with an LSTM."""

    def make(self, hidden: int) -> nn.Module:
        self.embedding = nn.Embedding(16, hidden, padding_idx=0)
        self.head = nn.Linear(hidden, 16, bias=False)
        self.head.weight = self.embedding.weight
        return nn.LSTM(hidden, hidden, batch_first=True)

    def loss(self, batch: Any) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(batch["input_ids"]), batch["lengths"],
                                                   batch_first=True, enforce_sorted=False)  # fmt: skip
        found, _ = nn.utils.rnn.pad_packed_sequence(self.net(packed)[0], batch_first=True)
        return F.cross_entropy(self.head(found).flatten(0, 1), batch["input_ids"].flatten())


class SparseEmbedding(Plain):
    """Sparse gradients and the optimizer for them."""

    def make(self, hidden: int) -> nn.Module:
        return nn.EmbeddingBag(16, 1, sparse=True)

    def loss(self, batch: Any) -> Tensor:
        return (self.net(batch["input_ids"]).squeeze(-1) - batch["label"]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SparseAdam(list(self.parameters()), lr=self.lr)


class Frozen(Plain):
    """A frozen first layer, left out of the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)  # type: ignore[index,operator]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=self.lr)


class Unfreezing(Plain):
    """For `BackboneFinetuning`: has a `backbone`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x)).squeeze(-1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=self.lr)


class MadeInSetup(Plain):
    """Layers that need the data's shape are made in `setup`."""

    def make(self, hidden: int) -> nn.Module:
        return nn.Identity()

    def setup(self, stage: str) -> None:
        width = self.trainer.datamodule.train[0][0].numel()
        if isinstance(self.net, nn.Identity):
            self.net = nn.Linear(width, 1)


class Configured(Plain):
    """Layers made in `configure_model`."""

    def make(self, hidden: int) -> nn.Module:
        return nn.Identity()

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = nn.Linear(8, 1)


class Lazy(Plain):
    """Lazy layers, materialised by a batch of zeros in `setup`."""

    def make(self, hidden: int) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(hidden), nn.ReLU(), nn.LazyLinear(1))

    def setup(self, stage: str) -> None:
        with torch.no_grad():
            self(torch.zeros(2, 8))


class Ema(Plain):
    """Averages of its weights in a buffer, after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.average.mul_(0.9).add_(0.1 * self.net[2].weight.detach().flatten())  # type: ignore[index]
        self.calls += 1


class Checkpointed(Plain):
    """Activation checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False).squeeze(-1)


class WeightNorm(Plain):
    """Parametrized weights."""

    def make(self, hidden: int) -> nn.Module:
        first = nn.utils.parametrizations.weight_norm(nn.Linear(8, hidden))
        return nn.Sequential(first, nn.utils.parametrizations.spectral_norm(nn.Linear(hidden, 1)))


class ExtraState(Plain):
    """Saves and restores extra state."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["vocabulary"] = {"a": 1, "b": 2}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["vocabulary"] == {"a": 1, "b": 2}


class DropsFrozen(Frozen):
    """Leaves its frozen layer out of the checkpoint and puts it back."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in [name for name in checkpoint["state_dict"] if name.startswith("net.0.")]:
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"].update({k: v for k, v in self.state_dict().items() if k.startswith("net.0.")})


class Several(Plain):
    """Accepts the batches of `data.Combined`, including exhausted loaders."""

    def loss(self, batch: Any) -> Tensor:
        parts = batch.values() if isinstance(batch, dict) else batch
        if isinstance(parts, list) and len(parts) == 2 and isinstance(parts[0], Tensor):
            return super().loss(parts)
        return torch.stack([Plain.loss(self, part) for part in parts if part is not None]).sum()


class OfPairs(Plain):
    """Accepts dataclass batches."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch.x, batch.y) if hasattr(batch, "x") else batch)


class OwnData(Plain):
    """Defines its loaders, and needs no data module."""

    def train_dataloader(self) -> Any:
        from torch.utils.data import DataLoader

        from tests.compatibility.data import table

        return DataLoader(table(32), 4)

    def val_dataloader(self) -> Any:
        from torch.utils.data import DataLoader

        from tests.compatibility.data import table

        return DataLoader(table(8, seed=1), 4)


class Odd(Plain):
    """A constructor whose first parameter is not called `self`."""

    def __init__(this, width: int = 8) -> None:  # noqa: N805 -- that is the point
        super().__init__(hidden=width)


class Unused(Plain):
    """Has parameters that no loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)
