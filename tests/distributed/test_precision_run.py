"""Lightning trains in the precision of the plan."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.processes import launcher, run_warm
from tests.support.runs import TOY, events_of, only_run, toy_env, train_on

pytestmark = pytest.mark.slow

_SCRIPT = """
import json, os, sys
from launcher import fit, load_config

for precision in sys.argv[1:]:
    arguments = ["--model", "tests.support.toy.Toy", "--data", "tests.support.toy.ToyData", "--wandb.mode", "disabled",
             "--name", precision,
             "--precision", precision, "--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false",
             "--trainer.callbacks", "[{class_path: tests.support.toy.Probe}]"]
    result = fit(load_config(overrides=arguments))
    planned = [precision, result.plan.precision, result.plan.has_loss_scale]
    print("FOUND", json.dumps(planned), open(os.environ["PROBE"]).read())
"""


@pytest.mark.case(42)
def test_each_precision_that_a_cpu_can_run_is_trained_as_planned(tmp_path: Path) -> None:
    expected = {
        "32": ("32-true", "torch.float32"),
        "bf16": ("bf16-mixed", "torch.bfloat16"),
        "fp16": ("16-mixed", "torch.float16"),
        "16-true": ("16-true", "torch.float16"),
        "double": ("64-true", "torch.float64"),
        "bf16-true": ("bf16-true", "torch.bfloat16"),
        "auto": ("32-true", "torch.float32"),
    }
    env = {**toy_env(tmp_path / "trace"), "PROBE": str(tmp_path / "probe")}
    output = run_warm([sys.executable, "-c", _SCRIPT, *expected], tmp_path, env=env).check().output

    found = [line.split(" ", 1)[1] for line in output.splitlines() if line.startswith("FOUND")]
    decoder = json.JSONDecoder()
    assert len(found) == len(expected)
    for line in found:
        (asked, planned, has_scale), end = decoder.raw_decode(line)
        trained, dtype, scale, _ = json.loads(line[end:])
        assert (planned, dtype) == expected[asked]
        assert trained == planned
        assert (scale is not None) == has_scale == (planned == "16-mixed")


def test_fp16_on_two_cpu_ranks_has_a_real_gradient_scaler(tmp_path: Path) -> None:
    arguments = (
        *TOY,
        "--precision",
        "16-mixed",
        "--trainer.max_steps",
        "2",
        "--trainer.callbacks",
        "[{class_path: tests.support.toy.Probe}]",
    )
    env = {**toy_env(tmp_path / "trace"), "PROBE": str(tmp_path / "probe")}
    output = train_on(2, arguments, tmp_path, env).check().output

    precision, dtype, scale, strategy = json.loads((tmp_path / "probe").read_text())
    assert (precision, dtype, strategy) == ("16-mixed", "torch.float16", "DeterministicDDPStrategy")
    # It starts at 65536 and is halved if the first step overflows.
    assert scale in (65536.0, 32768.0)
    assert "on a CPU 16-mixed is for debugging" in output


def test_use_amp_on_a_cpu_trains_in_32_bit_with_one_notice(tmp_path: Path) -> None:
    arguments = (*TOY, "--use_amp", "true", "--trainer.max_steps", "2")
    output = run_warm(launcher(*arguments), tmp_path, env=toy_env(tmp_path / "trace")).check().output

    assert output.count("notice: use_amp was requested") == 1
    (planned,) = events_of(only_run(tmp_path), "planned")
    assert planned["plan"]["precision"] == "32-true"
