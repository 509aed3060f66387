"""Checks whether a run can resume from a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.nn.parameter import is_lazy

from launcher.checkpoint.formats import format_of
from launcher.checkpoint.precision import RESTORED_SCALER_KEYS, CheckpointPrecision, read_precision
from launcher.checkpoint.reader import Trust
from launcher.core.errors import ResumeError
from strategies.loss_scale import state_problem
from strategies.precision import Precision

# The keys that Lightning needs to resume a training, not only to load weights.
_NEEDED = ("state_dict", "loops", "global_step", "epoch", "optimizer_states")
# The start of torch's error message, before the class's name.
_REFUSED_BY_TORCH = "Error(s) in loading state_dict for "


def read_checkpoint(path: Path, trust: Trust | None = None, *, outline: bool = False) -> Mapping[str, Any]:
    """The content as `CheckpointFormat.read_outline` reads it, which lists the errors too."""
    return format_of(path).read_outline(path, trust, outline=outline)


def check_checkpoint(path: Path, trust: Trust | None = None) -> CheckpointPrecision:
    """Check that a training can resume from a checkpoint, and return the precision that it was trained in.

    Without `trust`, objects that need untrusted code are not checked.

    Raises:
        ResumeError: it is not a Lightning training checkpoint, or would run untrusted code.
    """
    content = read_checkpoint(path, trust, outline=True)
    missing = [key for key in _NEEDED if key not in content]
    if missing:
        raise ResumeError(
            f"resume: {path} is not a Lightning training checkpoint: it lacks {', '.join(missing)}; "
            "load plain weights in the model's own constructor"
        )
    return read_precision(content)


def scaler_problem(path: Path) -> str | None:
    """Why the saved loss scale cannot be restored; None if it can, or if the training had none."""
    if format_of(path).has_own_loss_scale:
        return None
    content = read_checkpoint(path)
    saved = [content[key] for key in RESTORED_SCALER_KEYS if key in content]
    if not saved:
        return "it was not saved" if read_precision(content).precision is Precision.FP16_MIXED else None
    return next(filter(None, map(state_problem, saved)), None)


def check_fits_model(path: Path, model: pl.LightningModule, saved: Mapping[str, Any] | None = None) -> None:
    """Compare names and shapes of the weights with the model's, after its `setup` and `configure_model`.

    `saved` has the weights after the model's `on_load_checkpoint`; None reads them.

    Raises:
        ResumeError: the checkpoint is of another model; lists the differences.
    """
    if model.strict_loading and (found := _differences(saved or read_checkpoint(path)["state_dict"], model)):
        raise _other_model_error(path, model, found)


@contextlib.contextmanager
def explain_other_model(path: Path | None, model: pl.LightningModule, trainer: pl.Trainer) -> Iterator[None]:
    """Replace torch's error about the weights, while Lightning restores them, by one that lists the differences.

    This is not checked before, as the model's hooks and layers may change names and shapes until then.
    """
    try:
        yield
    except RuntimeError as error:
        loaded = trainer._checkpoint_connector._loaded_checkpoint
        if path is None or not loaded or not str(error).startswith(_REFUSED_BY_TORCH + type(model).__name__):
            raise
        torch_lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise _other_model_error(path, model, _differences(loaded["state_dict"], model) or torch_lines) from error


def _differences(state: Mapping[str, Any], model: pl.LightningModule) -> list[str]:
    saved, own = _shapes(state), _shapes(model.state_dict(keep_vars=True))
    return [
        *(f"{name} is only in the checkpoint" for name in saved if name not in own),
        *(f"{name} is only in the model" for name in own if name not in saved),
        *(f"{name} is {saved[name]} in the checkpoint, {own[name]} in the model"
          for name in own if name in saved and None not in (own[name], saved[name]) and saved[name] != own[name]),
    ]  # fmt: skip


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Shapes by name; None for a lazy layer, whose shape depends on its first batch."""
    # ZeRO 3 keeps the shape of a partitioned parameter here.
    return {name: None if is_lazy(value) else tuple(getattr(value, "ds_shape", value.shape))
            for name, value in state.items() if isinstance(value, Tensor)}  # fmt: skip


def _other_model_error(path: Path, model: pl.LightningModule, differences: Sequence[str]) -> ResumeError:
    more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
    return ResumeError(
        f"resume: {path} is of another model than {type(model).__name__}: {'; '.join(differences[:5])}{more}\n"
        "use the model that was saved, or start a new run with another --name"
    )
