"""A script that frees its process group does not wait for gloo's threads, which may need the lock of Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import json, os, sys
import torch.distributed as dist
from launcher.process.collectives import keep_process_groups

def threads():
    return len(os.listdir("/proc/self/task"))

def train():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.new_group([0])
    dist.all_reduce(__import__("torch").ones(1))
    running = threads()
    dist.destroy_process_group()
    return running

before = [train(), threads()]
keep_process_groups()
first, second = [train(), threads()], [train(), threads()]
print(json.dumps([before, first, second, dist.is_initialized()]), flush=True)
os._exit(0)  # as a rank ends
"""


def test_the_threads_of_a_destroyed_group_are_not_joined() -> None:
    env = {"PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=env, timeout=60, capture_output=True, text=True, check=True
    )
    (running, left), first, second, is_initialized = json.loads(ended.stdout)
    assert left < running, "torch joins them"
    assert first[1] == first[0]
    assert second[1] == second[0] > first[0]
    assert not is_initialized
