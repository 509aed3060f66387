"""Peak memory: the estimate against live storages of real steps, beside DeepSpeed's own estimators.

    python -m tests.benchmarks.peak_memory [--ranks 1 2] [--models mlp gpt ...] [--dtypes fp32 bf16] [--batch 32]

Models of `tests.support.model_zoo`, which the formulas were written with, and of `tests.support.model_families`, which
are held out, are summarized separately. Real memory means storages seen by torch's dispatcher; memory of gloo and
oneDNN is measured in `tests.benchmarks.oracle`. Errors are (estimate - real) / real. DeepSpeed's estimators
know model states alone, for Adam in 16 bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from strategies.memory import estimate_memory
from strategies.model_states import ZeroSettings
from strategies.precision import Precision
from strategies.registry import DDP, SINGLE_DEVICE, ZERO_1, ZERO_2, ZERO_3
from strategies.trace import TraceTypes, trace_step
from tests.support.live_peaks import BUCKET
from tests.support.model_families import HELD_OUT, SMALL
from tests.support.processes import run

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = ZeroSettings(BUCKET, overlap_comm=False, persistence_threshold=500, prefetch_bucket_size=BUCKET)
PRECISIONS = {"fp32": Precision.FP32_TRUE, "bf16": Precision.BF16_TRUE}


def estimate(name: str, stage: int, dtype: str, ranks: int, batch_size: int) -> tuple[int, int]:
    """The launcher's estimate and DeepSpeed's, in bytes."""
    entry = SMALL[name]
    types = TraceTypes(module=torch.bfloat16 if dtype == "bf16" else None)
    trace, model = trace_step(entry.make, entry.batch(batch_size), batch_size, types=types)
    candidate = {0: DDP if ranks > 1 else SINGLE_DEVICE, 1: ZERO_1, 2: ZERO_2, 3: ZERO_3}[stage]
    ours = estimate_memory(model, trace, candidate, ranks, PRECISIONS[dtype], settings=SETTINGS).total
    if stage == 3:
        largest = max(p.numel for p in model.parameters)
        theirs = estimate_zero3_model_states_mem_needs(model.numel, largest, ranks, 1, cpu_offload=False)[1]
    else:
        theirs = estimate_zero2_model_states_mem_needs(model.numel, ranks, 1, cpu_offload=False)[1]
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=list(SMALL), choices=list(SMALL))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(PRECISIONS))
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    errors: dict[bool, list[float]] = {False: [], True: []}
    theirs_errors: dict[bool, list[float]] = {False: [], True: []}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "peaks"
            arguments = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
            arguments += [
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                "127.0.0.1:0",
                "-m",
                "tests.support.live_peaks",
                str(out),
            ]
            arguments += [",".join(options.models), "0,1,2,3", ",".join(options.dtypes), str(options.batch)]
            env = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
            run(arguments, Path(name), env=env, timeout=3600).check()
            files = [Path(f"{out}-{rank}").read_text().splitlines() for rank in range(ranks)]
        for lines in zip(*files, strict=True):
            cases = [json.loads(line) for line in lines]
            case, real = cases[0], max(c["peak"] for c in cases)
            ours, theirs = estimate(case["model"], case["stage"], case["dtype"], ranks, options.batch)
            held_out = case["model"] in HELD_OUT
            errors[held_out].append((ours - real) / real)
            if case["stage"]:
                theirs_errors[held_out].append((theirs - real) / real)
            print(f"{ranks} ranks, {case['model']:15} stage {case['stage']} {case['dtype']}: real {real}, "
                  f"estimate {(ours - real) / real:+.2%}, DeepSpeed's {(theirs - real) / real:+.0%}")  # fmt: skip
    for held_out, name in ((False, "fitted"), (True, "held out")):
        if errors[held_out]:
            print(f"{name}: {_summary(errors[held_out], theirs_errors[held_out])}")


def _summary(ours: list[float], theirs: list[float]) -> str:
    under = sum(error < -0.02 for error in ours) / len(ours)
    return (
        f"median error {statistics.median(map(abs, ours)):.2%} (target at most 3 %), "
        f"{min(ours):+.1%} to {max(ours):+.1%}; "
        f"{under:.1%} of {len(ours)} cases under by more than 2 % (target at most 1 %); "
        f"DeepSpeed's estimators: median error {statistics.median(map(abs, theirs)):.0%}"
    )


if __name__ == "__main__":
    main()
