"""pytorch-forecasting's TemporalFusionTransformer, after its tutorial, on a generated series."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data import GroupNormalizer
from pytorch_forecasting.metrics import QuantileLoss


@functools.cache
def series() -> TimeSeriesDataSet:
    """Four series of 24 steps."""
    steps = np.arange(24)
    frames = [pd.DataFrame({"time_idx": steps, "value": 5 + np.sin(steps / 3 + shop) + shop, "shop": f"shop {shop}",
                            "price": (steps % 5).astype(float)}) for shop in range(4)]  # fmt: skip
    return TimeSeriesDataSet(
        pd.concat(frames, ignore_index=True),
        time_idx="time_idx",
        target="value",
        group_ids=["shop"],
        max_encoder_length=8,
        max_prediction_length=2,
        static_categoricals=["shop"],
        time_varying_known_reals=["time_idx", "price"],
        time_varying_unknown_reals=["value"],
        target_normalizer=GroupNormalizer(groups=["shop"]),
        add_relative_time_idx=True,
        add_target_scales=True,
    )


class Data(pl.LightningDataModule):
    """The loaders that `TimeSeriesDataSet.to_dataloader` makes."""

    def train_dataloader(self) -> Any:
        return series().to_dataloader(train=True, batch_size=8, num_workers=0)

    def val_dataloader(self) -> Any:
        return series().to_dataloader(train=False, batch_size=8, num_workers=0)


class Model(TemporalFusionTransformer):
    """Created by `from_dataset`; its hyperparameters hold objects of pytorch-forecasting's and pandas'."""

    def __init__(self) -> None:
        made = TemporalFusionTransformer.from_dataset(
            series(), learning_rate=0.03, hidden_size=8, attention_head_size=2, dropout=0.1, hidden_continuous_size=4,
            loss=QuantileLoss(), log_interval=-1,
        )  # fmt: skip
        super().__init__(**dict(made.hparams), loss=QuantileLoss(), logging_metrics=made.logging_metrics)
