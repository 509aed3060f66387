"""Start, restart and memory against torchrun and other launchers, with the same toy, in turns.

    python -m tests.benchmarks.launch start [--ranks 2 8] [--repeats 5] [--peers torchrun lightning accelerate torchx]
                                                                           command to first optimizer step
    python -m tests.benchmarks.launch kill [--repeats 20]                  SIGKILL of a rank to the next optimizer step
    python -m tests.benchmarks.launch memory [--ranks 8]                   PSS of all processes after the start

The peers run a plain Lightning script (`launch_clock.py`), see `peers.py`; with `lightning` it starts all ranks.
W&B is off on all sides. Medians, and the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.launch_clock import read_marks
from tests.benchmarks.peers import PEERS, peer_command
from tests.support.processes import descendants

REPOSITORY = Path(__file__).resolve().parents[2]
_TIMEOUT = 120.0


def command(who: str, ranks: int, steps: int, restarts: int, pause: float) -> list[str]:
    """The command line of one launcher."""
    if who == "launcher":
        marks = f"[{{class_path: tests.benchmarks.launch_clock.Marks, init_args: {{pause: {pause}}}}}]"
        return [sys.executable, "-m", "launcher", "fit", "--nproc-per-node", str(ranks), "--max-restarts",
                str(restarts), "--model", "tests.support.toy.Toy", "--data", "tests.support.toy.ToyData",
                "--data.size", "512",
                "--data.batch_size", "2", "--wandb.mode", "disabled", "--trainer.max_steps", str(steps),
                "--trainer.max_epochs", "-1", "--checkpoint.every_n_steps", "1", "--trainer.callbacks",
                marks]  # fmt: skip
    plain = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts),
             str(Path(__file__).with_name("plain_clock.py"))]  # fmt: skip
    if who == "launcher run":
        return [sys.executable, "-m", "launcher", "run", *plain]
    if who == "torchrun, plain script":
        return [sys.executable, "-m", "torch.distributed.run", *plain]
    return peer_command(who, ranks, restarts)


@contextlib.contextmanager
def running(
    who: str, ranks: int, steps: int, *, restarts: int = 0, pause: float = 0.0
) -> Iterator[tuple[subprocess.Popen[bytes], Path, float]]:
    """A run in a temporary folder: process, file of marks, wall-clock time of the start. Killed at the end."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        marks = Path(folder) / "marks"
        paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "MARKS": str(marks), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
               "STEPS": str(steps), "PAUSE": str(pause), "DEVICES": str(ranks),
               # torchx and NeMo-Run search torchrun in PATH.
               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
        began = time.time()
        arguments = command(who, ranks, steps, restarts, pause)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(arguments, cwd=folder, env=env, start_new_session=True, **quiet)
        try:
            yield process, marks, began
        finally:
            # torchrun's ranks have separate sessions and outlive it.
            for pid in (process.pid, *descendants(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def wait_for_mark(marks: Path, process: subprocess.Popen[bytes], after: float, step: int = 1) -> float | None:
    """Time of the first optimizer step that ended later than `after`; None if the run ended or took too long."""
    give_up = time.time() + _TIMEOUT
    while time.time() < give_up:
        found = [when for when, number in read_marks(marks) if when > after and number >= step]
        if found:
            return found[0]
        if process.poll() is not None:
            return None
        time.sleep(0.01)
    return None


def start_seconds(who: str, ranks: int) -> float | None:
    """From the command to the end of the first optimizer step."""
    with running(who, ranks, 2) as (process, marks, began):
        first = wait_for_mark(marks, process, began)
        return None if first is None else first - began


def kill_seconds(who: str) -> float | None:
    """From SIGKILL of rank one, in the third step or later, to the end of the next optimizer step."""
    with running(who, 2, 100_000, restarts=1, pause=0.05) as (process, marks, began):
        if wait_for_mark(marks, process, began, step=3) is None:
            return None
        victim = int(Path(f"{marks}-pid-1").read_text())
        os.kill(victim, signal.SIGKILL)
        killed = time.time()
        # A running step may still end.
        rank_zero = Path(f"{marks}-pid-0").read_text()
        give_up = killed + _TIMEOUT
        while Path(f"{marks}-pid-0").read_text() in ("", rank_zero):
            if process.poll() is not None or time.time() > give_up:
                return None
            time.sleep(0.01)
        after = Path(f"{marks}-pid-0").stat().st_mtime
        recovered = wait_for_mark(marks, process, after)
        return None if recovered is None else recovered - killed


def pss_mebibytes(who: str, ranks: int) -> float | None:
    """Proportional set size of all processes of the run, once it trains."""
    with running(who, ranks, 100_000, pause=1.0) as (process, marks, began):
        if wait_for_mark(marks, process, began) is None:
            return None
        total = 0
        for pid in (process.pid, *descendants(process.pid)):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    total += int(line.split()[1]) if line.startswith("Pss:") else 0
        return total / 1024


def report(what: str, unit: str, ours: list[float | None], theirs: dict[str, list[float | None]]) -> None:
    """Print medians, ratios and the number of successes."""
    good = [value for value in ours if value is not None]
    print(f"{what}: launcher {statistics.median(good):.2f} {unit} ({len(good)} of {len(ours)} worked)"
          if good else f"{what}: launcher never worked", flush=True)  # fmt: skip
    for name, values in theirs.items():
        pairs = [(a, b) for a, b in zip(ours, values, strict=True) if a is not None and b is not None]
        worked = [value for value in values if value is not None]
        if not pairs:
            print(f"  {name}: {len(worked)} of {len(values)} worked")
            continue
        ratios = [a / b for a, b in pairs]
        print(
            f"  {name} {statistics.median(worked):.2f} {unit} ({len(worked)} of {len(values)} worked), ratio "
            f"{statistics.median(ratios):.3f}; ratios {' '.join(f'{ratio:.3f}' for ratio in ratios)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "kill", "memory"))
    parser.add_argument("--ranks", type=int, nargs="+", default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS[:2])
    options = parser.parse_args()
    # `timeout` ends this process with SIGTERM; its runs must end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.what == "kill":
        times = [(kill_seconds("launcher"), kill_seconds("torchrun")) for _ in range(options.repeats)]
        report("kill to next step, 2 ranks", "s", [a for a, _ in times], {"torchrun": [b for _, b in times]})
    elif options.what == "memory":
        for ranks in options.ranks or [8]:
            ours, theirs = pss_mebibytes("launcher", ranks), pss_mebibytes("torchrun", ranks)
            report(f"PSS of {ranks} ranks", "MiB", [ours], {"torchrun": [theirs]})
    else:
        for ranks in options.ranks or [2, 8]:
            rows = [(start_seconds("launcher", ranks), *(start_seconds(peer, ranks) for peer in options.peers))
                    for _ in range(options.repeats)]  # fmt: skip
            columns = {peer: [row[n + 1] for row in rows] for n, peer in enumerate(options.peers)}
            report(f"start, {ranks} ranks", "s", [row[0] for row in rows], columns)


if __name__ == "__main__":
    main()
