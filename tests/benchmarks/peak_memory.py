"""Peak memory: the estimate against live storages of real steps, beside DeepSpeed's own estimators.

    python -m tests.benchmarks.peak_memory [--ranks 1 2] [--models mlp gpt ...] [--dtypes fp32 bf16] [--batch 32]
        [--stages 0 1 2 3 fsdp2 fsdp2_grad_op hsdp fsdp2+last fsdp2+checkpoint ...]

Stages are those of ZeRO, 0 without it, and FSDP2's variants (see `tests.support.live_peaks`), which also know the type
'mixed'. `fsdp2_offload` is not compared: a CPU has nowhere to offload to.

Models of `tests.support.model_zoo`, which the formulas were written with, and of `tests.support.model_families`, which
are held out, are summarized separately. Real memory means storages seen by torch's dispatcher; memory of gloo and
oneDNN is measured in `tests.benchmarks.oracle`. Errors are (estimate - real) / real. DeepSpeed's estimators
know model states alone, for Adam in 16 bits.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from strategies.memory import estimate_memory
from strategies.model_states import ZeroSettings
from strategies.registry import DDP, SINGLE_DEVICE, ZERO_1, ZERO_2, ZERO_3
from tests.support.live_peaks import BUCKET
from tests.support.model_families import HELD_OUT, SMALL
from tests.support.peak_estimates import PRECISIONS, estimate_sharded, measure_peaks, trace

SETTINGS = ZeroSettings(BUCKET, overlap_comm=False, persistence_threshold=500, prefetch_bucket_size=BUCKET)


def estimate(name: str, stage: int, dtype: str, ranks: int, batch_size: int) -> tuple[int, int]:
    """The launcher's estimate and DeepSpeed's, in bytes."""
    found, model = trace(name, dtype, batch_size)
    candidate = {0: DDP if ranks > 1 else SINGLE_DEVICE, 1: ZERO_1, 2: ZERO_2, 3: ZERO_3}[stage]
    ours = estimate_memory(model, found, candidate, ranks, PRECISIONS[dtype], settings=SETTINGS).total
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
    parser.add_argument("--stages", nargs="+", default=["0", "1", "2", "3"])
    options = parser.parse_args()
    errors: dict[bool, list[float]] = {False: [], True: []}
    theirs_errors: dict[bool, list[float]] = {False: [], True: []}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            cases = [options.models, options.stages, options.dtypes]
            measured = list(measure_peaks(cases, ranks, options.batch, Path(folder), 3600))
        for case, real in measured:
            name, stage, dtype = case["model"], case["stage"], case["dtype"]
            if isinstance(stage, str):
                ours, theirs = estimate_sharded(name, stage, dtype, ranks, options.batch), None
            else:
                ours, theirs = estimate(name, stage, dtype, ranks, options.batch)
            held_out = name in HELD_OUT
            errors[held_out].append((ours - real) / real)
            line = f"{ranks} ranks, {name:15} stage {stage} {dtype}: real {real}, estimate {(ours - real) / real:+.2%}"
            if theirs is not None:
                if stage:
                    theirs_errors[held_out].append((theirs - real) / real)
                line += f", DeepSpeed's {(theirs - real) / real:+.0%}"
            print(line)
    for held_out, name in ((False, "fitted"), (True, "held out")):
        if errors[held_out]:
            print(f"{name}: {_summary(errors[held_out], theirs_errors[held_out])}")


def _summary(ours: list[float], theirs: list[float]) -> str:
    under = sum(error < -0.02 for error in ours) / len(ours)
    return (
        f"median error {statistics.median(map(abs, ours)):.2%} (target at most 3 %), "
        f"{min(ours):+.1%} to {max(ours):+.1%}; "
        f"{under:.1%} of {len(ours)} cases under by more than 2 % (target at most 1 %)"
        + (f"; DeepSpeed's estimators: median error {statistics.median(map(abs, theirs)):.0%}" if theirs else "")
    )


if __name__ == "__main__":
    main()
