"""Modules as users write them, for comparing FSDP2 with DDP. Each is an ordinary module without any sharding code."""

from __future__ import annotations

import copy
import io
import warnings
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

WIDTH = 12


class Block(nn.Module):
    """A residual MLP with a method besides `forward`."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.hidden(x)

    def hidden(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(functional.gelu(self.up(self.norm(x)))))


class Base(pl.LightningModule):
    """Three blocks between two layers; keeps the losses of its steps."""

    lr = 0.01

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.losses: list[float] = []
        self.make()

    def make(self) -> None:
        self.enter = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self(x).float(), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.keep(loss)
        return loss

    def keep(self, loss: Tensor) -> None:
        self.losses.append(loss.item())
        self.log("loss", loss, sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("val_loss", loss, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.losses.append(self.loss(batch).item())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def data(size: int, batch: int = 4) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    samples = TensorDataset(torch.randn(size, 6, generator=g), torch.randint(0, 4, (size,), generator=g))
    return DataLoader(samples, batch)


class Tied(Base):
    def make(self) -> None:
        super().make()
        self.head = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.out.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(super().forward(x))


class FrozenInBlocks(Base):
    def make(self) -> None:
        super().make()
        self.enter.requires_grad_(False)
        for block in self.blocks:
            block.up.requires_grad_(False)  # type: ignore[union-attr]
        self.blocks[1].requires_grad_(False)


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.blocks)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.blocks, optimizer, lr=0.01)


class Finetuned(Base):
    def configure_callbacks(self) -> Any:
        return [Unfreezing()]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class ByHand(Base):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()  # type: ignore[union-attr]
            loss = self.loss(batch)
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")  # type: ignore[arg-type]
            optimizer.step()  # type: ignore[union-attr]
            self.keep(loss)


class PlainByHand(ByHand):
    """Its blocks are single layers."""

    def make(self) -> None:
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class StepsInBackward(ByHand):
    """Steps each parameter as soon as it has its gradient. Under DDP that is before the sum: it steps afterwards."""

    def on_fit_start(self) -> None:
        self.single = {p: torch.optim.SGD([p], 0.05) for p in self.parameters()}
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for p in self.single:
                p.register_post_accumulate_grad_hook(self.step)

    def step(self, parameter: Tensor) -> None:
        self.single[parameter].step()  # type: ignore[index]
        parameter.grad = None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.manual_backward(loss)
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            for p in self.single:
                self.step(p)
        self.keep(loss)

    def configure_optimizers(self) -> Any:
        return None


class Penalized(Base):
    """The gradient of the loss is part of the loss; validation computes gradients too."""

    def loss(self, batch: Any) -> Tensor:
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            loss = super().loss((x, batch[1]))
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            (second,) = torch.autograd.grad(gradient.tanh().sum(), x, retain_graph=True)
        return loss + 5 * gradient.pow(2).sum() + functional.linear(self.enter(second), self.head.weight).sum()


class PenalizedByHand(ByHand):
    """Two gradient penalties and a loss with passes of their own, one of them twice."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        penalties = [self.penalty(batch[0] * factor) for factor in (1, 0.5)]
        loss = self.loss(batch)
        for each in (penalties[0], loss):
            self.manual_backward(each)
        self.manual_backward(penalties[1], retain_graph=True)
        self.manual_backward(penalties[1])
        optimizer.step()  # type: ignore[union-attr]
        self.keep(loss + penalties[0] + penalties[1])

    def penalty(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self(x).tanh().sum(), x, create_graph=True)
        return gradient.norm(dim=1).mean()


class Transformed(Base):
    """Uses torch's function transforms."""

    def loss(self, batch: Any) -> Tensor:
        gradient = torch.func.grad(lambda x: self(x).pow(2).sum())(batch[0])
        y, tangent = torch.func.jvp(self, (batch[0] + gradient.detach(),), (torch.ones_like(batch[0]),))
        return functional.cross_entropy(y, batch[1]) + tangent.pow(2).mean()


class Routed(Base):
    """A rank calls its own one of the blocks."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[(self.global_rank + self.global_step // 2) % 3](self.enter(x)))


class Expert(Block):
    """One that a rank may not call."""


class Experts(Routed):
    def make(self) -> None:
        super().make()
        self.blocks = nn.ModuleList(Expert() for _ in range(3))


class Adapted(Base):
    """Calls itself with other weights."""

    def loss(self, batch: Any) -> Tensor:
        weights = {name: p * 0.5 for name, p in self.named_parameters()}
        return functional.cross_entropy(torch.func.functional_call(self, weights, (batch[0],)), batch[1])


class GradientsOfWeights(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        gradients = torch.autograd.grad(loss, list(self.parameters()), create_graph=True)
        return loss + sum(gradient.pow(2).sum() for gradient in gradients)


class Copied(Base):
    """Copies a block."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        copy.deepcopy(self.blocks[0])


class ShardInHook(Base):
    """Computes with a weight and an ordinary tensor outside of a step."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append((torch.ones(2, WIDTH) * self.head.weight[:2]).sum().item())


class Joined(Base):
    """Joins the loss with the norm of a weight."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.stack([super().training_step(batch, batch_idx), self.blocks[0].up.weight.norm()]).sum()  # type: ignore[union-attr, operator]


class Factored(Base):
    """torch's Adafactor computes with norms of rows."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters())


class MixedStates(Base):
    """Its optimizer keeps an ordinary tensor for each parameter."""

    def configure_optimizers(self) -> Any:
        return RowWise(self.parameters(), {})


class RowWise(torch.optim.Optimizer):
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                rows = self.state[p].setdefault("rows", torch.zeros(p.shape[:-1] or [2]))
                rows.add_(p.grad.pow(2).mean(-1))
        return loss


class GraphOfBackward(ByHand):
    """Keeps a graph of the gradients of all parameters."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch), create_graph=True)


class Regularized(Base):
    """Norms of all parameters are part of the loss, in and outside of blocks, with a factor for each rank."""

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        scale = loss.detach() * (1 + self.global_rank)
        loss += 0.01 * sum(p.pow(2).sum() for p in self.parameters()) * scale
        loss = loss - self.blocks[1].up.weight.mean() / (2 + self.head.weight.norm())  # type: ignore[union-attr, operator]
        return 0.01 * self.blocks[0].down.weight.norm() + loss  # type: ignore[union-attr, operator]


class Noisy(Base):
    """Draws weights and noise again, and reads weights as arrays and lists."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn_like(p), alpha=1e-3)
                p += 1e-3 * torch.rand_like(p) * torch.bernoulli(torch.full_like(p, 0.5))
        weight = self.blocks[batch_idx % 3].up.weight  # type: ignore[union-attr]
        nn.init.trunc_normal_(weight, std=0.3)  # type: ignore[arg-type]
        for draw in ("uniform_", "exponential_", "log_normal_", "bernoulli_", "random_", "normal_"):
            getattr(self.head.weight.data, draw)()
            self.losses.append(float(self.head.weight.detach().cpu().numpy().std()))
        self.losses.append(sum(self.head.bias.detach().tolist()))


class Gan(Base):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def make(self) -> None:
        self.generator = nn.Sequential(nn.Linear(6, WIDTH), Block(), Block(), nn.Linear(WIDTH, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, WIDTH), Block(), nn.Linear(WIDTH, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        first, second = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(first)
        loss = -self.discriminator(self.generator(x)).mean()
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        real = functional.softplus(-self.discriminator(x)).mean()
        fake = functional.softplus(self.discriminator(self.generator(x).detach())).mean()
        self.manual_backward(real + fake)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)
        self.keep(loss + real + fake)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.losses.append(self.discriminator(self.generator(batch[0])).sum().item())

    def configure_optimizers(self) -> Any:
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=self.lr) for part in parts]


class CalledDirectly(Base):
    """Calls a block by number, a method of another one, and uses weights and buffers as functions."""

    def make(self) -> None:
        super().make()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.shift = nn.Buffer(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.enter.weight, self.enter.bias) * self.scale + self.shift
        x = self.blocks[2](x) + self.blocks[0].hidden(x)  # type: ignore[operator]
        return functional.linear(self.blocks[1](x), self.head.weight)

    def on_validation_epoch_end(self) -> None:
        self.losses.append(self.head(torch.ones(1, WIDTH)).sum().item())
        self.losses.append(self.blocks[0](torch.ones(1, WIDTH)).sum().item())


class Normed(Base):
    def make(self) -> None:
        super().make()
        self.enter = nn.utils.parametrizations.weight_norm(self.enter)
        self.head = nn.utils.parametrizations.spectral_norm(self.head)
        for block in self.blocks:
            block.up = nn.utils.parametrizations.weight_norm(block.up)  # type: ignore[union-attr, arg-type]


class OldWeightNorm(Base):
    def make(self) -> None:
        super().make()
        self.enter = nn.utils.spectral_norm(self.enter)
        for block in self.blocks:
            block.up = nn.utils.spectral_norm(block.up)  # type: ignore[union-attr, type-var, assignment]


class BatchNorms(Base):
    """Statistics are buffers, which DDP takes from rank zero."""

    def make(self) -> None:
        super().make()
        self.head = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 4))  # type: ignore[assignment]
        for block in self.blocks:
            block.norm = nn.BatchNorm1d(WIDTH)  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        # The gradient of a bias before a norm is only noise, which Adam would scale up.
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Scalars(Base):
    """A scalar, as CLIP's, one of another type and a complex one."""

    def make(self) -> None:
        super().make()
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.table = nn.Parameter(torch.arange(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x) * self.temperature.exp() * self.wide.sum().float() + self.table
        return out * self.phase.abs().sum()


class Parts(Base):
    """Rank 1 uses another head than rank 0; one head is never used."""

    def make(self) -> None:
        super().make()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + self.heads[1 if self.global_rank % 2 else 0](x @ torch.ones(6, WIDTH))


class PartsLater(Base):
    """All ranks use both heads in the first steps, then each rank another one."""

    def make(self) -> None:
        super().make()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        used = self.heads if self.global_step < 4 else [self.heads[self.global_rank % 2]]
        return super().forward(x) + sum(head(x @ torch.ones(6, WIDTH)) for head in used)


class CalledTwice(Base):
    """Calls each block twice in a step, as models that share their layers."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return self.head(x)


@dataclass
class Hidden:
    """A block's output that no container of tensors is."""

    values: list[Tensor]


class HiddenBlock(Block):
    def forward(self, x: Hidden) -> Hidden:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Hidden([super().forward(x.values[0])])


class InDataclass(Base):
    def make(self) -> None:
        super().make()
        self.blocks = nn.ModuleList(HiddenBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = Hidden([self.enter(x)])
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.values[0])


class OneLayerByHand(ByHand):
    """Without blocks."""

    def make(self) -> None:
        self.only = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


class BackwardOfTensor(OneLayerByHand):
    """Without a block or a call of itself, whose hooks would sum the gradients."""

    def loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.only(batch[0]), batch[1])

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class OneLayer(Base):
    def make(self) -> None:
        self.only = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


class Scheduled(Base):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]


class Plateau(Base):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.RMSprop(self.parameters(), lr=0.05)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class Watched(Base):
    """Reads gradients and weights in hooks, and clips by itself."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        from lightning.pytorch.utilities import grad_norm

        norms = grad_norm(self, norm_type=2)
        self.log_dict(norms)
        self.losses.append(float(norms["grad_2.0_norm_total"]))
        self.losses.append(self.enter.weight.grad.norm().item())  # type: ignore[union-attr]

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.losses.append(self.blocks[0].up.weight.detach().sum().item())  # type: ignore[union-attr]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.4, 0.4)

    def on_train_epoch_end(self) -> None:
        self.losses.append(sum(p.pow(2).sum().item() for p in self.parameters()))


class OwnList(Base):
    """Makes its optimizer of a list that exists before sharding."""

    def make(self) -> None:
        super().make()
        self.trained = [{"params": [p], "weight_decay": 0.1} for p in self.parameters()]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.trained, lr=self.lr)


class Metric(Base):
    def make(self) -> None:
        from torchmetrics.classification import MulticlassAccuracy

        super().make()
        self.accuracy = MulticlassAccuracy(4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.accuracy(self(x), y)
        self.log("accuracy", self.accuracy)
        return {"loss": super().training_step(batch, batch_idx), "more": x}

    def on_train_epoch_end(self) -> None:
        self.losses.append(self.accuracy.compute().item())


class Configured(Base):
    """Builds its layers in `configure_model`."""

    def make(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            torch.manual_seed(3)
            super().make()


class Momentum(Base):
    """A frozen copy follows the trained network, in the step as MoCo's, and after it as DINO's."""

    after = False

    def make(self) -> None:
        super().make()
        self.start, self.teacher = nn.Linear(6, WIDTH), nn.ModuleList(Block() for _ in range(2))
        self.start.requires_grad_(False)
        self.teacher.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.after:
            with torch.no_grad():
                for ours, theirs in self._pairs():
                    theirs.data = theirs.data * 0.9 + ours.data * 0.1
        return super().training_step(batch, batch_idx)

    def _pairs(self) -> Any:
        ours = [*self.enter.parameters(), *self.blocks[0].parameters(), *self.blocks[1].parameters()]
        return zip(ours, [*self.start.parameters(), *self.teacher.parameters()], strict=True)

    def loss(self, batch: Any) -> Tensor:
        target = self.start(batch[0])
        for block in self.teacher:
            target = block(target)
        student = self.blocks[1](self.blocks[0](self.enter(batch[0])))
        return super().loss(batch) + functional.mse_loss(student, target.roll(1))


class MomentumAfter(Momentum):
    after = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for ours, theirs in self._pairs():
            theirs.data.mul_(0.9).add_(0.1 * ours.detach().data)


class Normalizing(Base):
    """Changes a trained weight inside the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.head.weight.copy_(functional.normalize(self.head.weight))
        return super().training_step(batch, batch_idx)


class Clamping(Base):
    """Clamps its weights inside the step, as a critic does, before they are used."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for parameter in self.head.parameters():
            parameter.data.clamp_(-0.01, 0.01)
        return super().training_step(batch, batch_idx)


class Dropped(Base):
    def make(self) -> None:
        super().make()
        self.blocks = nn.ModuleList(Block(dropout=0.2) for _ in range(3))


class Fixed(nn.Linear):
    """Has the same values wherever it is initialised."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for p in self.parameters():
                value = torch.arange(p.numel()).sin().view(p.shape)
                p.copy_(distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value)


class OnDemand(Base):
    """Builds its layers on the meta device where they are sharded; two are tied."""

    on_meta = True

    def make(self) -> None: ...

    def configure_model(self) -> None:
        if hasattr(self, "head"):
            return
        with torch.device("meta" if self.is_sharded() and self.on_meta else "cpu"):
            self.enter, self.blocks = Fixed(6, WIDTH), nn.ModuleList(self.block() for _ in range(3))
            self.head, self.tied = Fixed(WIDTH, 4, bias=False), Fixed(WIDTH, 4, bias=False)
            self.tied.weight = self.head.weight
            self.norm = nn.BatchNorm1d(4)

    def is_sharded(self) -> bool:
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    @staticmethod
    def block() -> nn.Module:
        block = Block()
        block.up, block.down = Fixed(WIDTH, 2 * WIDTH), Fixed(2 * WIDTH, WIDTH)
        return block

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(self.head(hidden) + self.tied(hidden))


class ShardedByUser(OnDemand):
    """Calls `fully_shard` for some modules; the launcher shards the rest."""

    on_meta = False

    def configure_model(self) -> None:
        super().configure_model()
        if self.is_sharded() and not isinstance(self.enter, FSDPModule):
            for block in self.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]
            fully_shard(self.enter, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]


class SavedByHand(Base):
    """Saves its weights at the end, as under DDP."""

    def on_train_end(self) -> None:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.save(self.state_dict(), io.BytesIO())
        self.warnings = [str(each.message) for each in seen]


class ShardedOnMeta(ShardedByUser):
    """Builds its layers on the meta device, and shards some of them."""

    on_meta = True


class Overflowing(Base):
    """The gradients of rank 1 overflow in one step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(self.trainer.precision_plugin.scaler.get_scale())  # type: ignore[union-attr]
        return loss * 1e30 if self.global_rank == 1 and self.global_step == 3 and self.current_epoch == 0 else loss


class InnerCalled(Base):
    """Calls a layer inside of a block."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.blocks[1].up(self.enter(x))[:, :4]  # type: ignore[operator, union-attr]


class InnerUsed(Base):
    """Uses the weight of a layer inside of a block."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        penalty = functional.linear(batch[0], self.blocks[1].down.weight[:, :6]).sum()  # type: ignore[union-attr]
        return super().training_step(batch, batch_idx) + penalty


class Created(Base):
    """Makes a layer in its first step."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Linear(4, 4)
        return self.late(super().forward(x))


class LazyLayers(Base):
    def make(self) -> None:
        super().make()
        self.head = nn.LazyLinear(4)


class Averaged(Base):
    def configure_callbacks(self) -> Any:
        return [StochasticWeightAveraging(0.01)]


class ExponentiallyAveraged(Base):
    def configure_callbacks(self) -> Any:
        return [EMAWeightAveraging()]


class OnMeta(Base):
    """Has a parameter on the meta device that nothing initialises."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.position = nn.Parameter(torch.ones(3))


class Hooked(Base):
    """Registers a hook on a gradient before the parameter is sharded."""

    def make(self) -> None:
        super().make()
        self.head.weight.register_hook(lambda gradient: gradient * 2)


# Models that FSDP2 cannot train, and parts of the error.
REFUSED = {
    "Clamping": ("changes head.weight", "on_train_batch_end"),
    "Normalizing": ("changes head.weight in its step", "on_train_batch_end"),
    "InnerCalled": ("calls blocks.1.up (Linear) directly", "when blocks.1 (Block) is called", "fsdp.wrap", "[Linear]"),
    "InnerUsed": ("fsdp_models.py:", "those of a block outside of its forward pass"),
    "Created": ("created late.weight, late.bias in its first step", "configure_model"),
    "LazyLayers": ("head.weight, head.bias of LazyLayers have no shape yet", "configure_model"),
    "Averaged": ("StochasticWeightAveraging", "`strategy: ddp`"),
    "ExponentiallyAveraged": ("EMAWeightAveraging", "`strategy: ddp`"),
    "OnMeta": ("OnMeta are on the meta device", "reset_parameters"),
    "BackwardOfTensor": ("BackwardOfTensor calls `loss.backward()`", "`self.manual_backward(loss)`"),
    "GraphOfBackward": ("create_graph=True", "torch.autograd.grad"),
    "Routed": ("rank 0 is at block blocks.0 and rank 1 at block blocks.1", "`fsdp.wrap`"),
    "Adapted": ("Block is called with other weights", "functional_call", "`strategy: ddp`"),
    "GradientsOfWeights": ("fsdp_models.py:", "takes gradients of weights", "`strategy: ddp`"),
    "Copied": ("a copy of Block is impossible", "full_tensor()"),
    "ShardInHook": ("fsdp_models.py:", "combines a sharded tensor with an ordinary one", "full_tensor()"),
    "Joined": ("fsdp_models.py:", "weights that are sharded at that moment"),
    "Factored": ("the optimizer Adafactor cannot update sharded parameters", "torch.optim.AdamW"),
    "MixedStates": ("the optimizer RowWise cannot update sharded parameters", "`strategy: ddp`"),
    "Hooked": ("head.weight of Hooked has a gradient hook", "on_fit_start"),
}

MODELS = {
    kind.__name__: kind
    for kind in (Base, Tied, FrozenInBlocks, Finetuned, ByHand, PlainByHand, StepsInBackward, Gan, CalledDirectly,
                 Normed, OldWeightNorm, BatchNorms, Scalars, Parts, OneLayer, Scheduled, Plateau, Watched, OwnList,
                 Metric, Configured, Momentum, MomentumAfter, Normalizing, Clamping, Dropped, InnerCalled, InnerUsed,
                 Created, LazyLayers, Averaged, ExponentiallyAveraged, OnMeta, Hooked, OnDemand, ShardedByUser,
                 Overflowing, ShardedOnMeta, SavedByHand,
                 BackwardOfTensor, OneLayerByHand, Penalized, PenalizedByHand, Transformed, GraphOfBackward,
                 Adapted, GradientsOfWeights, Regularized, Noisy, Routed, Experts, Copied,
                 ShardInHook, Joined, Factored, MixedStates,
                 PartsLater, CalledTwice, InDataclass)
}  # fmt: skip
