"""The early hang verdict: injected hangs, and a long run with slow phases that are no hangs.

    python -m tests.benchmarks.hang_verdict [--each 5] [--at-once 2] [--only loader,stop]
    python -m tests.benchmarks.hang_verdict --quiet-minutes 20

Each case trains on 2 or 3 gloo ranks until a fault at a random step of a random rank. It passes if the first event
`hang_suspected` names this rank alone, and has the time from the fault to the event.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from launcher.core.events import read_events

REPOSITORY = Path(__file__).resolve().parents[2]
# Each kind, with its variants in turn.
KINDS = {
    "stop": ("stop",),
    "loader": ("loader",),
    "uneven": ("uneven",),
    "mismatch": ("gather", "barrier"),
    "write": ("write", "write_hook"),
    "sleep": ("sleep_step", "sleep_hook"),
}
_TIMEOUT = 150.0


@dataclass(frozen=True)
class Case:
    kind: str
    fault: str
    ranks: int
    by_rank: int
    at: int


def make_cases(each: int, kinds: list[str], seed: int) -> list[Case]:
    draw = random.Random(seed)  # noqa: S311 -- no secret
    cases: list[Case] = []
    for number in range(each):
        for kind in kinds:
            # Three gloo ranks abort after such a mismatch instead of waiting.
            ranks = 2 if kind == "uneven" else 2 + number % 2
            fault = KINDS[kind][number % len(KINDS[kind])]
            cases.append(Case(kind, fault, ranks, draw.randrange(ranks), draw.randrange(20, 120)))
    return cases


def run_case(case: Case) -> tuple[Case, float | None, list[int] | None, str]:
    """Seconds from the fault to the verdict, the named ranks and the message; None without a verdict."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        cwd = Path(folder)
        mark = cwd / "mark"
        values = ["--model.fault", case.fault, "--model.at", case.at, "--model.by_rank", case.by_rank,
                  "--data.fault", case.fault, "--data.at", case.at, "--data.by_rank", case.by_rank,
                  "--trainer.limit_val_batches", 0]  # fmt: skip
        process = start(cwd, case.ranks, [*map(str, values)], {"HANG_MARK": str(mark)}, log)
        try:
            end = time.monotonic() + _TIMEOUT
            while time.monotonic() < end and process.poll() is None:
                found = events(cwd, "hang_suspected")
                if found:
                    seconds = float(found[0]["time"]) - float(mark.read_text())
                    return case, seconds, found[0]["ranks"], found[0]["message"]
                time.sleep(0.5)
            text = (cwd / "log").read_text(errors="replace")[-1500:]
            return case, None, None, f"exit code {process.poll()}: {text}"
        finally:
            end_session(process)


def start(cwd: Path, ranks: int, arguments: list[str], env: dict[str, str], log: BinaryIO) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "launcher", "fit", "--nproc-per-node", str(ranks), "--name", "it",
               "--model", "tests.support.hanging.Hanging", "--data", "tests.support.hanging.HangingData",
               "--wandb.mode", "disabled", "--accelerator", "cpu", "--trainer.max_steps", "1000000",
               "--trainer.max_epochs", "-1", "--trainer.log_every_n_steps", "50", *arguments]  # fmt: skip
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        command, cwd=cwd, env=variables, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
    )


def events(cwd: Path, *kinds: str) -> list[dict[str, Any]]:
    path = cwd / "runs" / "it" / "events.jsonl"
    return [event for event in read_events(path) if event["kind"] in kinds] if path.exists() else []


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill the agent, its fork server and its ranks."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(entry.name)) == process.pid:
                os.kill(int(entry.name), signal.SIGKILL)
    process.wait()


def run_quiet(minutes: float) -> None:
    """Train with slow batches, validations and checkpoints; prints all notices."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        cwd = Path(folder)
        arguments = ["--model", "tests.support.hanging.Slow", "--trainer.val_check_interval", "400",
                     "--trainer.num_sanity_val_steps", "1", "--checkpoint.every_n_steps", "300"]  # fmt: skip
        process = start(cwd, 2, arguments, {"SLOW_SAVES": "10"}, log)
        try:
            end = time.monotonic() + 60 * minutes
            while time.monotonic() < end and process.poll() is None:
                time.sleep(1.0)
            assert process.poll() is None, (cwd / "log").read_text()[-3000:]
            steps = [event["step"] for event in events(cwd, "step")]
            counts = {kind: len(events(cwd, kind)) for kind in ("validation", "checkpoint", "hang_suspected")}
            print(f"{minutes:.0f} minutes, {steps[-1] if steps else 0} steps, {counts}")
            for event in events(cwd, "hang_suspected", "hang_over"):
                print(event)
        finally:
            end_session(process)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quiet-minutes", type=float, default=0)
    options = parser.parse_args()
    if options.quiet_minutes:
        run_quiet(options.quiet_minutes)
        return
    right: dict[str, list[float]] = {}
    cases = make_cases(options.each, options.only.split(","), options.seed)
    with ThreadPoolExecutor(options.at_once) as pool:
        for case, seconds, ranks, message in pool.map(run_case, cases):
            is_right = ranks == [case.by_rank]
            if is_right and seconds is not None:
                right.setdefault(case.kind, []).append(seconds)
            print(f"{'right' if is_right else 'WRONG'} {case} {seconds} {ranks} {message}", flush=True)
    times = [seconds for found in right.values() for seconds in found]
    if not times:
        return
    print(f"{len(times)} of {len(cases)} right, verdict after {statistics.median(times):.1f} s (median), "
          f"{min(times):.1f} to {max(times):.1f} s")  # fmt: skip
    for kind, found in right.items():
        print(f"{kind:9} {len(found)} right, {statistics.median(found):.1f} s, at most {max(found):.1f} s")


if __name__ == "__main__":
    main()
