"""chemprop's message-passing network on a handful of molecules."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from chemprop import data, nn
from chemprop.models import MPNN

_SMILES = ("CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCC", "C1CCCCC1", "CO", "CN", "CCCl", "CCBr", "c1ccncc1", "CC#N",
           "CS", "CCS", "CC=O", "C=C", "C#C",
           "CC(C)O", "CCOC", "OCCO", "NCCN", "c1ccsc1", "c1ccoc1", "O=C=O")  # fmt: skip


class Data(pl.LightningDataModule):
    """The loaders that chemprop's `build_dataloader` makes."""

    def _loader(self, smiles: Any, shuffle: bool) -> Any:
        points = [data.MoleculeDatapoint.from_smi(each, [len(each) / 5]) for each in smiles]
        return data.build_dataloader(data.MoleculeDataset(points), batch_size=4, num_workers=0, shuffle=shuffle)

    def train_dataloader(self) -> Any:
        return self._loader(_SMILES[:16], shuffle=True)

    def val_dataloader(self) -> Any:
        return self._loader(_SMILES[16:], shuffle=False)


class Model(MPNN):
    """As in chemprop's training notebook; its hyperparameters contain classes."""

    def __init__(self) -> None:
        super().__init__(nn.BondMessagePassing(d_h=16, depth=2), nn.MeanAggregation(),
                         nn.RegressionFFN(input_dim=16, hidden_dim=8), batch_norm=True, warmup_epochs=1)  # fmt: skip
