"""Every kind of model, in one process: trained in one and two parts by the launcher, and in two by Lightning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from launcher import fit, load_config
from launcher.core.errors import ResumeError
from tests.support import changing_models


def by_lightning(kind: type[pl.LightningModule], folder: Path) -> int:
    """Steps after the second part."""
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False,
                               "accelerator": "cpu", "default_root_dir": folder}  # fmt: skip
    first = pl.Trainer(max_epochs=1, **options)
    first.fit(kind(), changing_models.Data())
    first.save_checkpoint(folder / "plain.ckpt")
    second = pl.Trainer(max_epochs=2, **options)
    second.fit(kind(), changing_models.Data(), ckpt_path=folder / "plain.ckpt", weights_only=False)
    return second.global_step


def by_launcher(kind: str, name: str, epochs: int, *more: str) -> dict[str, Any]:
    """The weights of the last checkpoint."""
    arguments = ("--model", f"tests.support.changing_models.{kind}", "--data", "tests.support.changing_models.Data",
                 "--name", name, "--wandb.mode", "disabled", "--accelerator", "cpu", "--devices", "1",
                 "--trainer.enable_model_summary", "false", "--trainer.max_epochs", str(epochs))  # fmt: skip
    trainer = fit(load_config([], [*arguments, *more]), env={}).trainer
    return {key: value.clone() for key, value in trainer.lightning_module.state_dict().items()}


def main() -> None:
    warnings.simplefilter("ignore")
    for kind in changing_models.KINDS:
        name = kind.__name__
        steps = by_lightning(kind, Path("plain") / name)
        whole = by_launcher(name, f"{name}-whole", 2)
        by_launcher(name, f"{name}-parts", 1)
        parts = by_launcher(name, f"{name}-parts", 2, "--resume", "auto")
        same = whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
        print(f"{name}: {steps} steps, {'same' if same else 'differs'}", flush=True)
    checkpoint = "runs/Objects-parts/checkpoints/last.ckpt"
    try:
        by_launcher("Objects", "elsewhere", 3, "--resume", checkpoint)
    except ResumeError as error:
        print(f"refused: {error}")
    trusted = by_launcher("Objects", "trusted", 3, "--resume", checkpoint, "--resume-trust")
    print(f"trusted: {len(trusted)} weights")


if __name__ == "__main__":
    main()
