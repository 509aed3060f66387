"""`python -m tests.compatibility.plain RANKS NAME...`: programs under plain Lightning, one after the other.

Each runs in its own folder with its LightningCLI config; an exception is written to `failed`.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from tests.compatibility.programs import PROGRAMS, Program


def keep_order() -> None:
    """Let training loaders keep their own order on several ranks.

    Lightning shuffles them there even where the loader does not; the launcher keeps the loader's order on any number of
    ranks. Without this the results could not be compared.
    """
    import lightning.pytorch.trainer.connectors.data_connector as connector
    from torch.utils.data import RandomSampler

    original = connector._get_distributed_sampler

    def in_own_order(dataloader: Any, shuffle: bool, **options: Any) -> Any:
        return original(dataloader, shuffle and isinstance(dataloader.sampler, RandomSampler), **options)

    connector._get_distributed_sampler = in_own_order


def run(program: Program, ranks: int) -> None:
    """Train the program in the current folder."""
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.cli import LightningCLI

    settings = program.settings()
    settings["trainer"] |= {"accelerator": "cpu", "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
    settings["seed_everything"] = 42
    if program.data is None:
        settings["data"] = {"class_path": "tests.compatibility.data.Table"}
    made = LightningCLI(LightningModule, LightningDataModule, trainer_class=Trainer, run=False, args=settings,
                        subclass_mode_model=True, subclass_mode_data=True, save_config_callback=None)  # fmt: skip
    made.trainer.fit(made.model, datamodule=None if program.data is None else made.datamodule)


def main() -> None:
    """Run all programs; a failure does not stop the others."""
    warnings.simplefilter("ignore")
    keep_order()
    ranks, wanted = int(sys.argv[1]), sys.argv[2:]
    top = Path.cwd()
    for program in PROGRAMS:
        if program.name not in wanted:
            continue
        folder = top / program.name
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        os.environ["RECORD"] = str(folder / "record")
        try:
            run(program, ranks)
        except BaseException as error:  # noqa: BLE001 -- whatever a program raises is its result
            Path(f"failed-{os.environ.get('RANK', 0)}").write_text(f"{type(error).__name__}\n{traceback.format_exc()}")


if __name__ == "__main__":
    main()
