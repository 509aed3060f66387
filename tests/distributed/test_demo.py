"""The README's first command: the built-in demo, on one rank and under torchrun."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest
import yaml

from tests.support.processes import launcher, run, torchrun
from tests.support.runs import events_of, only_run

pytestmark = pytest.mark.slow


def test_the_demo_on_two_ranks_shows_plan_progress_baseline_and_paths(tmp_path: Path) -> None:
    output = run(torchrun(2), tmp_path, timeout=240).check().output

    directory = only_run(tmp_path)
    assert re.search(r"strategy +ddp +DDP: 2 ranks", output)
    assert re.search(r"precision +32-true +precision auto: mixed precision is native on no rank", output)
    losses = [float(text) for text in re.findall(r"^step \d+/\d+ .*  train_loss ([\d.]+)", output, re.M)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    bigram = float(re.search(r"bigram model of the same text: val_loss ([\d.]+)", output)[1])  # type: ignore[index]
    reached = float(re.search(r"this model: +val_loss ([\d.]+)", output)[1])  # type: ignore[index]
    assert reached < bigram - 0.2
    for shown in (f"run         runs/{directory.name}", f"runs/{directory.name}/checkpoints/last.ckpt",
                  f"wandb sync runs/{directory.name}/wandb/offline-run-", "--resume auto"):  # fmt: skip
        assert shown in output
    # Only rank zero writes to the terminal, and only once.
    assert len(re.findall(r"^Plan", output, re.M)) == 1
    assert output.count("W&B is offline") == 1


def test_the_demo_on_one_rank_writes_a_private_run_directory(tmp_path: Path) -> None:
    arguments = ("--trainer.max_steps", "20", "--trainer.limit_val_batches", "2")
    run(launcher(*arguments), tmp_path).check()

    directory = only_run(tmp_path)
    assert yaml.safe_load((directory / "config.yaml").read_text())["trainer"]["max_steps"] == 20
    plan = events_of(directory, "planned")[0]["plan"]
    assert plan["strategy"]["name"] == "single_device"
    assert [e["step"] for e in events_of(directory, "step")] == [10, 20]
    assert events_of(directory, "finished")[0]["step"] == 20
    assert "step 20/20" in (directory / "logs" / "rank-0.log").read_text()
    assert (directory / "checkpoints" / "last.ckpt").exists()
    for path in [directory, *directory.rglob("*")]:
        if not path.is_symlink():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_devices_starts_that_many_ranks_without_torchrun(tmp_path: Path) -> None:
    arguments = ("--devices", "2", "--trainer.max_steps", "4", "--trainer.limit_val_batches", "0")
    output = run(launcher(*arguments, "--checkpoint.monitor", "null"), tmp_path).check().output

    directory = only_run(tmp_path)
    assert events_of(directory, "planned")[0]["plan"]["world_size"] == 2
    assert {path.name for path in (directory / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert "Done" in output
