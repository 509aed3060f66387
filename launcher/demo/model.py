"""The built-in demo: a character-level GPT on English text that ships with CPython."""

import math
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional

from launcher.demo.data import DemoText


class Block(nn.Module):
    """One pre-norm transformer layer: causal self-attention, then an MLP of four times the width."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(n_embd)
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.projection = nn.Linear(n_embd, n_embd)
        self.norm_mlp = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x`, shape (batch, time, n_embd); the output has the same shape."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, time, 3, self.n_head, width // self.n_head)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, n_head, time, width / n_head)
        dropout = self.dropout if self.training else 0.0
        heads = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = x + self.projection(heads.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(self.norm_mlp(x))


class DemoReport(Callback):
    """At the end, compares the loss with that of a bigram model of the same text, and prints a sample."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print on rank zero; sampling needs no other rank."""
        data = getattr(trainer, "datamodule", None)
        loss = trainer.callback_metrics.get("val_loss")
        if not (trainer.is_global_zero and isinstance(pl_module, DemoGPT) and isinstance(data, DemoText)):
            return
        lines = [f"a bigram model of the same text: val_loss {data.bigram_loss():.3f} nats per character"]
        if loss is not None:
            lines.append(f"this model:                      val_loss {float(loss):.3f}")
        # ZeRO-3 shards the parameters over all ranks; rank zero alone cannot gather them.
        if not any(hasattr(parameter, "ds_id") for parameter in pl_module.parameters()):
            text = " ".join(sample(pl_module, data, "The ", 70, seed=0).split())
            lines.append(f"a sample: The {text}")
        sys.stdout.write("\n".join(lines) + "\n")


class DemoGPT(LightningModule):
    """A small GPT over characters (Radford et al. 2019, pre-norm); every parameter gets a gradient in every step.

    Args:
        vocab_size: number of character ids; the default is that of DemoText.
        block_size: longest context, in characters.
        n_layer, n_head, n_embd: layers, attention heads per layer, width; n_head must divide n_embd.
        lr: peak learning rate of AdamW.
        dropout: probability, in attention and after each MLP.
        weight_decay: of AdamW, on the weights of linear layers only.
        warmup_steps: optimizer steps of linear warm-up; at most a tenth of the run.
    """

    # Every step uses every parameter, so DDP may use the first step's graph for all steps.
    static_graph = True

    def __init__(
        self,
        vocab_size: int = 97,
        block_size: int = 64,
        n_layer: int = 3,
        n_head: int = 4,
        n_embd: int = 96,
        lr: float = 4e-3,
        dropout: float = 0.0,
        weight_decay: float = 0.1,
        warmup_steps: int = 50,
    ) -> None:
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_head={n_head} must divide n_embd={n_embd}")
        self.save_hyperparameters()
        self.block_size = block_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.characters = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(Block(n_embd, n_head, dropout) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(n_embd)
        # Not tied to the embedding: a shared parameter is a special case for ZeRO-3, and here it saves only 2 %.
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # as GPT-2; the default of 1.0 dominates the attention output

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (batch, time), int64, time <= block_size, to logits (batch, time, vocab_size)."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.characters(ids) + self.positions(positions))))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss over the batch in nats per character, a scalar."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `val_loss`, the mean over all windows and ranks, in nats per character."""
        self.log("val_loss", self._loss(batch), prog_bar=True, on_epoch=True, sync_dist=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        """AdamW; linear warm-up, then a cosine to a tenth of `lr` at the run's end (flat if that is unknown)."""
        # By layer type, not by number of dimensions: ZeRO-3 flattens the parameters before it asks for the optimizer.
        decayed = [m.weight for m in self.modules() if isinstance(m, nn.Linear)]
        others = [p for p in self.parameters() if not any(p is weight for weight in decayed)]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.99))
        total = float(self.trainer.estimated_stepping_batches)
        warmup = self.warmup_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        logits = self(inputs)
        # In float32 with every precision plugin: the log-sum-exp of float16 logits loses most of its digits.
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def lr_factor(step: int, warmup: int, total: float) -> float:
    """Multiplier of the peak learning rate at optimizer step `step`, in (0, 1]; `total` steps may be infinite."""
    warmup = max(1, min(warmup, int(total / 10))) if math.isfinite(total) else max(1, warmup)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))


def sample(model: DemoGPT, data: DemoText, prompt: str, length: int, seed: int, temperature: float = 0.7) -> str:
    """`length` characters that continue `prompt` (not included), drawn at `temperature` > 0.

    The same seed gives the same text on one device. The model's train or eval mode is restored.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = data.encode(prompt or "\n")
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for _ in range(length):
                context = ids[-model.block_size :].unsqueeze(0).to(model.device)
                probs = functional.softmax(model(context)[0, -1].float().cpu() / temperature, dim=-1)
                ids = torch.cat((ids, torch.multinomial(probs, 1, generator=generator)))
    finally:
        model.train(was_training)
    return data.decode(ids[-length:].tolist()) if length else ""
