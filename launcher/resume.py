"""Whether a checkpoint is one to go on from. Nothing in the file is ever run: it is read with `weights_only`."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from launcher.checkpoint_precision import RESTORED_SCALER_KEYS, CheckpointPrecision, precision_of
from launcher.errors import ResumeError
from launcher.zero_checkpoint import read_zero_outline
from strategies.loss_scale import state_problem
from strategies.precision import Precision

# What Lightning needs to go on with a training, rather than only to load weights.
_NEEDED = ("state_dict", "loops", "global_step", "epoch", "optimizer_states")


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """The checkpoint's content, its tensors left on disk; of a DeepSpeed one the shapes alone.

    Raises:
        ResumeError: no checkpoint, a damaged one, or one whose loading would run code.
    """
    if path.is_dir():
        return read_zero_outline(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ResumeError(
            f"resume: {path} is no checkpoint, or holds objects whose loading would run code, which is never done: "
            f"{str(error).splitlines()[0]}; keep such objects out of save_hyperparameters and state dicts"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResumeError(
            f"resume: {path} is no checkpoint, or is damaged: {reason}; give another checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise ResumeError(f"resume: {path} holds a {type(content).__name__}, no Lightning checkpoint; give another one")
    return content


def check_checkpoint(path: Path) -> CheckpointPrecision:
    """Read the file's outline.

    Returns:
        The precision that it was trained in.

    Raises:
        ResumeError: it is no Lightning checkpoint of a training.
    """
    content = read_checkpoint(path)
    missing = [key for key in _NEEDED if key not in content]
    if missing:
        raise ResumeError(
            f"resume: {path} is no Lightning training checkpoint: it lacks {', '.join(missing)}; "
            "load plain weights in the model's own constructor"
        )
    return precision_of(content)


def scaler_problem(path: Path) -> str | None:
    """Why the saved loss scale cannot be gone on with; None if it can, or if there was none to save."""
    if path.is_dir():
        return None  # DeepSpeed's, which keeps and restores its scale itself
    content = read_checkpoint(path)
    saved = [content[key] for key in RESTORED_SCALER_KEYS if key in content]
    if not saved:
        return "it was not saved" if precision_of(content).precision is Precision.FP16_MIXED else None
    return next(filter(None, map(state_problem, saved)), None)


def check_fits_model(path: Path, model: pl.LightningModule) -> None:
    """Compare names and shapes with the model's.

    Raises:
        ResumeError: the checkpoint is of another model; says what differs.
    """
    if is_overridden("configure_model", model) or not model.strict_loading:
        return  # its parameters are not all there yet, or may differ on purpose
    saved = {name: tuple(value.shape) for name, value in read_checkpoint(path)["state_dict"].items()
             if hasattr(value, "shape")}  # fmt: skip
    own = {name: tuple(value.shape) for name, value in model.state_dict().items() if hasattr(value, "shape")}
    differences = [f"{n} is only in the checkpoint" for n in saved if n not in own]
    differences += [f"{n} is only in the model" for n in own if n not in saved]
    differences += [f"{n} is {saved[n]} in the checkpoint, {own[n]} in the model"
                    for n in own if n in saved and saved[n] != own[n]]  # fmt: skip
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ResumeError(
            f"resume: {path} is of another model than {type(model).__name__}: "
            + "; ".join(differences[:5])
            + more
            + "\nmake the model as it was, or begin anew under another --name"
        )
