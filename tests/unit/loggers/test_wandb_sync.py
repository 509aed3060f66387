"""The command that uploads a run's offline data, run by a shell with the real `wandb sync` and a loopback server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.loggers.wandb_sync import find_sync_command
from tests.support.wandb_server import wandb_server

_ATTEMPTS = """
import sys, wandb
from pathlib import Path
settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
for attempt in (2, 1):
    with wandb.init(project="p", id="abc", mode="offline", resume="allow", dir=sys.argv[1], settings=settings) as run:
        for step in range(3):
            run.log({"trainer/global_step": 10 * attempt + step})
        made = Path(run.dir).parent
    made.rename(made.with_name(f"offline-run-2026010{attempt}-abc"))
"""


@pytest.mark.slow
def test_every_attempt_is_uploaded_in_order_even_after_one_that_was_killed(tmp_path: Path) -> None:
    data = tmp_path / "my runs" / "wandb"
    data.mkdir(parents=True)
    env = {**os.environ, "WANDB_DIR": ""}
    subprocess.run([sys.executable, "-c", _ATTEMPTS, str(data.parent)], check=True, timeout=60, env=env)
    # Killed before its first record, and within its last one.
    (data / "offline-run-20260100-abc").mkdir()
    (data / "offline-run-20260100-abc" / "run-abc.wandb").write_bytes(b":W&B\x00\x00\x00")
    with (data / "offline-run-20260101-abc" / "run-abc.wandb").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 3)
    command = find_sync_command(data, data)
    assert command is not None
    with wandb_server() as server:
        env = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40, "HOME": str(tmp_path),
               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
        # It writes logs below its working directory.
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env, timeout=120, capture_output=True,
                              text=True, check=False)  # fmt: skip
    assert {run["name"] for run in server.runs} == {"abc"}, done.stderr
    steps = [json.loads(line)["trainer/global_step"] for stream in server.streams
             for line in (stream.get("files") or {}).get("wandb-history.jsonl", {}).get("content", ())]  # fmt: skip
    assert steps == [10, 11, 12, 20, 21, 22]


def test_a_single_attempt_with_data_is_named(tmp_path: Path) -> None:
    for name, size in (("offline-run-1-abc", 7), ("offline-run-2-abc", 8), ("offline-run-3-abc", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run-abc.wandb").write_bytes(b"x" * size)
    (tmp_path / "offline-run-4-abc").mkdir()
    assert find_sync_command(tmp_path, Path("a b")) == "wandb sync 'a b/offline-run-2-abc'"
    assert find_sync_command(tmp_path / "none", Path("x")) is None
