"""A distributed training launcher for PyTorch Lightning.

The public names load on first use, so that `import launcher` imports neither torch, Lightning, DeepSpeed nor W&B.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.core.distribution import OWN_PACKAGES
from launcher.core.distribution import __version__ as __version__

if TYPE_CHECKING:
    from launcher.config.loading import load_config as load_config
    from launcher.config.schema import RunConfig as RunConfig
    from launcher.coordinator import TrainingCoordinator as TrainingCoordinator
    from launcher.launch_function import launch as launch
    from launcher.loggers.wandb_config import build_wandb_config as build_wandb_config
    from launcher.loggers.wandb_config import detect_model_type as detect_model_type
    from launcher.monitoring.amp_callback import AmpWandbCallback as AmpWandbCallback
    from launcher.monitoring.loss_scale_monitor import LossScaleMonitor as LossScaleMonitor
    from launcher.planning.plan import Plan as Plan
    from launcher.training.fit import fit as fit
    from launcher.wizard.answers import WizardConfig as WizardConfig
    from launcher.wizard.wizard import SetupWizard as SetupWizard
    from strategies.precision import compute_effective_precision as compute_effective_precision


def _import_own_packages() -> None:
    """Import `strategies` and `slurm` first: the user's folder, first on the path, may have packages of these names.

    Raises:
        ImportError: another package of the same name is imported already.
    """
    for name in OWN_PACKAGES[1:]:
        file = Path(__file__).resolve().parents[1] / name / "__init__.py"
        if name in sys.modules:
            imported = getattr(sys.modules[name], "__file__", None)
            if imported is None or Path(imported).resolve() != file:
                raise ImportError(
                    f"another module named {name!r} is imported already ({imported}), and launcher has a package of "
                    "that name: rename it, or import launcher first"
                )
            continue
        spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is missing: reinstall launcher")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


_import_own_packages()

_LAZY = {
    "AmpWandbCallback": "launcher.monitoring.amp_callback",
    "LossScaleMonitor": "launcher.monitoring.loss_scale_monitor",
    "TrainingCoordinator": "launcher.coordinator",
    "build_wandb_config": "launcher.loggers.wandb_config",
    "detect_model_type": "launcher.loggers.wandb_config",
    "Plan": "launcher.planning.plan",
    "RunConfig": "launcher.config.schema",
    "SetupWizard": "launcher.wizard.wizard",
    "WizardConfig": "launcher.wizard.answers",
    "compute_effective_precision": "strategies.precision",
    "fit": "launcher.training.fit",
    "launch": "launcher.launch_function",
    "load_config": "launcher.config.loading",
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
    "launch",
    "load_config",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'launcher' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
