"""The cost of parts of the launcher in a step: one training in which they are present in every other block of steps.

A part is the name of one of the launcher's callbacks, or `module:function` or `module:Class.method`, which returns
None in the other blocks. The first steps of a block are left out, and the figure is the median over pairs of
neighbouring blocks.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from tests.benchmarks.recovery.cases import CASES, config
from tests.benchmarks.recovery.rounds import Launch, run

LEFT_OUT = 3
# The step that the target of 1 % is about, in seconds.
STEP = 0.020


class Part:
    """Something that is switched off and on.

    Args:
        name: see the module.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._taken: list[tuple[int, pl.Callback]] = []
        self._function: Any = None

    def switch(self, trainer: Any, *, on: bool) -> None:
        """Add or remove it.

        Raises:
            ValueError: there is no such callback.
        """
        if ":" in self.name:
            self._switch_function(on=on)
        elif on:
            # A new list: Lightning is iterating over the old one.
            callbacks = list(trainer.callbacks)
            for index, callback in self._taken:
                callbacks.insert(index, callback)
            trainer.callbacks, self._taken = callbacks, []
        else:
            own = [type(each).__name__ for each in trainer.callbacks if type(each).__module__.startswith("launcher.")]
            if self.name not in own:
                raise ValueError(f"no callback {self.name}; the launcher has: {', '.join(own)}")
            self._taken = [
                (index, each) for index, each in enumerate(trainer.callbacks) if type(each).__name__ == self.name
            ]
            taken = {id(each) for _, each in self._taken}
            trainer.callbacks = [each for each in trainer.callbacks if id(each) not in taken]

    def _switch_function(self, *, on: bool) -> None:
        module, _, path = self.name.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        if self._function is None:
            self._function = owner.__dict__[name]
        setattr(owner, name, self._function if on else lambda *_, **__: None)


class Blocks(pl.Callback):
    """Measures steps with and without the parts in turns.

    Args:
        steps: in a block.
        parts: all of them are switched together.
    """

    def __init__(self, steps: int, parts: list[str]) -> None:
        self.steps, self.parts = steps, [Part(name) for name in parts]
        self.times: dict[int, list[float]] = {}
        self.last = 0.0
        self.done = 0
        self.on = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        now, before = time.perf_counter(), self.last
        block, place = divmod(self.done, self.steps)
        if place >= LEFT_OUT:
            self.times.setdefault(block, []).append(now - before)
        self.done += 1
        # with, without, without, with: what drifts hits both alike.
        on = self.done // self.steps % 4 in (0, 3)
        if on is not self.on:
            for part in self.parts:
                part.switch(trainer, on=on)
            self.on = on
        self.last = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for part in self.parts:
            if not self.on:
                part.switch(trainer, on=True)
        if trainer.is_global_zero:
            means = [statistics.mean(times) for _, times in sorted(self.times.items())]
            Path(os.environ["RECOVERY_TRACE"], "blocks.json").write_text(json.dumps(means))


def measure(parts: Sequence[str], ranks: int, rounds: int, steps: int, folder: Path) -> None:
    """Print what the parts add to a step.

    Args:
        parts: see the module.
        ranks: number of ranks.
        rounds: pairs of blocks, with and without.
        steps: in a block.
        folder: an empty folder.
    """
    # Two blocks more: the first ones warm up.
    settings = config(CASES["mlp"], ranks, (2 * rounds + 4) * steps, 10**6)
    settings["model"]["init_args"] = {"pause": 0.002}
    settings["trainer"]["callbacks"] = [
        {"class_path": f"{__name__}.Blocks", "init_args": {"steps": steps, "parts": list(parts)}}
    ]
    file = folder / "cost.yaml"
    file.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "launcher", "fit", "--nproc-per-node", str(ranks), "--config", str(file)]
    outcome = run(Launch(command, ranks, timeout=1800), folder, None)
    blocks_file = folder / "blocks.json"
    if not blocks_file.exists():
        print((folder / "output").read_text(errors="replace")[-3000:])
        sys.exit(f"the training failed: {outcome.problem}")
    blocks = json.loads(blocks_file.read_text())[4:]
    pairs = [
        (with_, without) for i in range(0, len(blocks) - 3, 4)
        for with_, without in ((blocks[i], blocks[i + 1]), (blocks[i + 3], blocks[i + 2]))
    ]  # fmt: skip
    added = [with_ - without for with_, without in pairs]
    low, median, high = statistics.quantiles(added, n=4)
    step = statistics.median(without for _, without in pairs)
    print(
        f"{', '.join(parts)}: {median * 1e6:+.0f} us a step of {step * 1e3:.1f} ms (quartiles {low * 1e6:+.0f} to "
        f"{high * 1e6:+.0f}, {len(pairs)} pairs of {steps} steps, {ranks} ranks): {median / STEP:+.2%} of a step of "
        f"{STEP * 1e3:.0f} ms"
    )
