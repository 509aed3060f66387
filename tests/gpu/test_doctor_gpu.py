"""The doctor on a machine with a GPU. `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.processes import launcher, run

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def test_driver_gpus_and_links_are_found_and_a_rank_for_each_gpu_multiplies(tmp_path: Path) -> None:
    import torch

    count = torch.cuda.device_count()
    ended = run(launcher("doctor", "--json", "--nproc-per-node", str(count)), tmp_path, timeout=240)
    findings = json.loads(ended.output[ended.output.index("[\n") :])
    by_name = {f["name"]: f for f in findings}
    assert by_name["CUDA"]["status"] == "ok", ended.output
    assert f"is built for CUDA {torch.version.cuda}" in by_name["CUDA"]["found"]
    assert by_name["NCCL"]["found"].startswith(".".join(map(str, torch.cuda.nccl.version())))
    assert all(torch.cuda.get_device_name(i) in by_name[f"cuda {i}"]["found"] for i in range(count))
    assert ("GPU links" in by_name) == (count > 1)
    assert by_name["ranks"]["status"] == "ok", ended.output
    # Faster than any CPU: the product ran on the GPU.
    assert "TFLOP/s" in by_name["matmul"]["found"]
    assert ("all-reduce" in by_name) == (count > 1)
