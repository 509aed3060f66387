"""The built-in model and its data, which `launcher fit` trains without a config.

Configs name its classes as `launcher.demo.DemoGPT`, those of earlier versions too. Other packages use it only by these
class paths.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Lazy: the classes import torch.
    if name in ("DemoGPT", "DemoReport", "DemoText"):
        from launcher.demo import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
