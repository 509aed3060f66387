"""A distributed training launcher for PyTorch Lightning.

The public names load on first use, so that `import launcher` imports neither torch, Lightning, DeepSpeed nor W&B.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.amp_callback import AmpWandbCallback as AmpWandbCallback
    from launcher.config import RunConfig as RunConfig
    from launcher.config_sources import load_config as load_config
    from launcher.coordinator import TrainingCoordinator as TrainingCoordinator
    from launcher.loss_scale_monitor import LossScaleMonitor as LossScaleMonitor
    from launcher.main_path import fit as fit
    from launcher.plan import Plan as Plan
    from launcher.setup_wizard import SetupWizard as SetupWizard
    from launcher.wandb_config import build_wandb_config as build_wandb_config
    from launcher.wandb_config import detect_model_type as detect_model_type
    from launcher.wizard_config import WizardConfig as WizardConfig
    from strategies.precision import compute_effective_precision as compute_effective_precision

__version__ = "0.1.0"

_LAZY = {
    "AmpWandbCallback": "launcher.amp_callback",
    "LossScaleMonitor": "launcher.loss_scale_monitor",
    "TrainingCoordinator": "launcher.coordinator",
    "build_wandb_config": "launcher.wandb_config",
    "detect_model_type": "launcher.wandb_config",
    "Plan": "launcher.plan",
    "RunConfig": "launcher.config",
    "SetupWizard": "launcher.setup_wizard",
    "WizardConfig": "launcher.wizard_config",
    "compute_effective_precision": "strategies.precision",
    "fit": "launcher.main_path",
    "load_config": "launcher.config_sources",
}

__all__ = [
    "AmpWandbCallback",
    "LossScaleMonitor",
    "Plan",
    "RunConfig",
    "SetupWizard",
    "TrainingCoordinator",
    "WizardConfig",
    "__version__",
    "build_wandb_config",
    "compute_effective_precision",
    "detect_model_type",
    "fit",
    "load_config",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'launcher' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
