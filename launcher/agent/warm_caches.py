"""Importing this module, in the fork server, fills caches that every rank would fill at its start.

Only what cannot change while the fork server lives: types of the config's fields, versions of packages, the imports
that jsonargparse and Lightning postpone. The user's files and the config are read by each rank.
"""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.wandb import _WANDB_AVAILABLE
from lightning_utilities.core.apply_func import apply_to_collection
from torchmetrics.aggregation import MeanMetric

from launcher.config.schema import config_fields
from launcher.hardware.devices import library_versions
from launcher.process.interpreter_exit import list_open_files
from launcher.user_code.arguments import argument_problems
from launcher.user_code.sources import user_sources


def fill_caches() -> None:
    """Call what keeps its result. Starts no threads and reads no variable of a rank."""
    config_fields()
    library_versions()
    user_sources(sys.modules)
    list_open_files()
    argument_problems(pl.LightningDataModule, "data", {})
    # Python keeps for each abstract class which types are no subclass of it.
    metric = MeanMetric()
    for value in (metric, {"value": torch.zeros(1)}):
        apply_to_collection(value, torch.Tensor, torch.Tensor.clone)
    bool(_WANDB_AVAILABLE)


fill_caches()
