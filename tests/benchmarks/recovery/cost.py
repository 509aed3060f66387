"""The cost of parts of the launcher in a step: one training in which they are present in every other block of steps.

A part is the name of one of the launcher's callbacks, or `module:function` or `module:Class.method`, which returns
None in the other blocks. The first steps of a block are left out, and the figure is the median over pairs of
neighbouring blocks. On a busy machine the differences of blocks are noise, and the processor time of the part's own
calls is the better figure.
"""

from __future__ import annotations

import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from tests.benchmarks.recovery import trace
from tests.benchmarks.recovery.cases import CASES, config
from tests.benchmarks.recovery.rounds import Launch, run

LEFT_OUT = 3
# The step that the target of 1 % is about, in seconds.
STEP = 0.020


class Part:
    """Something that is switched off and on, and whose calls are timed.

    Args:
        name: see the module.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls = 0
        self.seconds = 0.0
        self._callbacks: list[pl.Callback] = []
        self._function: Any = None

    def time_calls(self, trainer: Any) -> None:
        """Find it and time its calls from now on.

        Raises:
            ValueError: there is no such callback.
        """
        if ":" in self.name:
            owner, name = self._owner()
            self._function = self._timed(owner.__dict__[name])
            setattr(owner, name, self._function)
            return
        own = [each for each in trainer.callbacks if type(each).__module__.startswith("launcher.")]
        self._callbacks = [each for each in own if type(each).__name__ == self.name]
        if not self._callbacks:
            names = ", ".join(type(each).__name__ for each in own)
            raise ValueError(f"there is no callback {self.name}; the launcher has: {names}")
        for callback in self._callbacks:
            for hook in dir(callback):
                # Lightning calls the empty ones of its base class too.
                if hook.startswith("on_") and getattr(type(callback), hook) is not getattr(pl.Callback, hook, None):
                    setattr(callback, hook, self._timed(getattr(callback, hook)))

    def switch(self, trainer: Any, *, on: bool) -> None:
        """Add or remove it."""
        if ":" in self.name:
            owner, name = self._owner()
            setattr(owner, name, self._function if on else lambda *_, **__: None)
        else:
            # A new list, as Lightning is iterating over the old one; checkpoint callbacks stay last.
            others = [each for each in trainer.callbacks if each not in self._callbacks]
            trainer.callbacks = [others[0], *self._callbacks, *others[1:]] if on else others

    def _owner(self) -> tuple[Any, str]:
        module, _, path = self.name.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, name

    def _timed(self, function: Any) -> Any:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.thread_time() - began
                self.calls += 1

        return call


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
        self.steps_on = 0
        self.on = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for part in self.parts:
            part.time_calls(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, before = time.perf_counter(), self.last
        block, place = divmod(self.done, self.steps)
        if place >= LEFT_OUT:
            self.times.setdefault(block, []).append(now - before)
        self.done += 1
        self.steps_on += self.on
        # With, without, without, with: what drifts changes both alike.
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
            found = {
                "mean": [statistics.mean(times) for _, times in sorted(self.times.items())],
                "median": [statistics.median(times) for _, times in sorted(self.times.items())],
                "calls": [part.calls for part in self.parts],
                "inside": sum(part.seconds for part in self.parts) / self.steps_on,
            }
            (trace.folder() / "blocks.json").write_text(json.dumps(found))


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
    command = [sys.executable, "-m", "launcher", "fit", "--nproc-per-node", str(ranks), "--max-restarts", "1",
               "--config", str(file)]  # fmt: skip
    outcome = run(Launch(command, ranks, timeout=1800), folder, None)
    blocks_file = folder / "blocks.json"
    if not blocks_file.exists():
        print((folder / "output").read_text(errors="replace")[-3000:])
        sys.exit(f"the training failed: {outcome.problem}")
    found = json.loads(blocks_file.read_text())
    print(f"{', '.join(parts)}: {ranks} ranks, {rounds} pairs of blocks of {steps} steps, calls {found['calls']}")
    for kind in ("mean", "median"):
        blocks = found[kind][4:]
        pairs = [(blocks[i + a], blocks[i + b]) for i in range(0, len(blocks) - 3, 4) for a, b in ((0, 1), (3, 2))]
        added = [with_ - without for with_, without in pairs]
        low, median, high = statistics.quantiles(added, n=4)
        step = statistics.median(without for _, without in pairs)
        print(f"by the blocks' {kind} step: {_figure(median)} (quartiles {low * 1e6:+.0f} to {high * 1e6:+.0f} us; a "
              f"step takes {step * 1e3:.1f} ms)")  # fmt: skip
    print(f"processor time of its calls: {_figure(found['inside'])}")


def _figure(seconds: float) -> str:
    return f"{seconds * 1e6:+.0f} us a step, {seconds / STEP:+.2%} of a step of {STEP * 1e3:.0f} ms"
