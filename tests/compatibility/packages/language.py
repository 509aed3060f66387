"""transformers' GPT-2 and BERT by their configs, trained as their users wrap them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers import get_linear_schedule_with_warmup as warm_up


class Tokens(Dataset[dict[str, Tensor]]):
    """Sequences of 12 tokens that count upwards."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": (torch.arange(12) + index) % 32, "attention_mask": torch.ones(12, dtype=torch.long)}


class Data(pl.LightningDataModule):
    """With `labels` for a language model, or a class for each sequence."""

    def __init__(self, batch_size: int = 4, classes: bool = False) -> None:
        super().__init__()
        self.batch_size, self.classes = batch_size, classes

    def _collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {**batch, "labels": batch["input_ids"][:, 0] % 2 if self.classes else batch["input_ids"]}

    def train_dataloader(self) -> Any:
        return DataLoader(Tokens(32), self.batch_size, shuffle=True, collate_fn=self._collate)

    def val_dataloader(self) -> Any:
        return DataLoader(Tokens(8), self.batch_size, collate_fn=self._collate)


class Gpt2(pl.LightningModule):
    """A language model with tied embeddings."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = self.make()

    def make(self) -> Any:
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                                          bos_token_id=0, eos_token_id=0))  # fmt: skip

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        schedule = warm_up(optimizer, 2, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Bert(Gpt2):
    """A classifier."""

    def make(self) -> Any:
        return BertForSequenceClassification(BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, num_labels=2))  # fmt: skip
