"""NCCL's flight recorder: its format, and a rank that does not enter a collective."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from launcher.agent.flight_recorder import read_flight_record
from tests.support.processes import launcher, run
from tests.support.runs import TOY, events_of, toy_env

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
_ONE_RANK = """
import torch, torch.distributed as dist
from launcher.agent.flight_recorder import parse_flight_record
from launcher.process.collectives import dump_flight_record

torch.cuda.set_device(0)
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(3, device="cuda"))
torch.cuda.synchronize()
record = parse_flight_record(dump_flight_record())
assert record.last == {"default_pg": 1}, record
assert all(collective.operation == "all_reduce" for collective in record.waiting), record
dist.destroy_process_group()
"""


def test_a_record_of_nccl_is_read(tmp_path: Path) -> None:
    run([sys.executable, "-c", _ONE_RANK], tmp_path).check()


def test_a_rank_that_does_not_enter_an_nccl_collective_is_reported_with_it(tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices; torch.cuda.device_count() is below 2")
    arguments = (*TOY[2:], "--model", "tests.support.faulty.Faulty", "--model.fault", "sleep", "--global_batch_size",
                 "8", "--trainer.max_epochs", "1", "--name", "it", "--devices", "2", "--hang-timeout",
                 "30")  # fmt: skip
    output = run(launcher("fit", *arguments), tmp_path, env=toy_env(tmp_path / "trace"), timeout=240).check(1).output

    absent = r"failed first: hung at step 3: .*it did not enter \w+ of .* of default_pg\), in which rank 0 waits"
    assert re.search(absent, output), output
    directory = tmp_path / "runs" / "it"
    assert events_of(directory, "hang")[0]["waiting_for"] == [1]
    (folder,) = directory.glob("hang-*")
    assert read_flight_record(folder / "rank-0.flight.json") is not None
