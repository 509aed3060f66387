from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.agent.hang_detection import LOADER_WAIT, describe_wait
from launcher.agent.rank_activity import Usage, describe_wait_channel, read_usage, read_wait_channel


def test_a_process_is_busy_if_it_computes_or_transfers() -> None:
    before = Usage(10.0, 1000)
    assert not Usage(10.01, 5000).is_busy_since(before, 2.0)
    assert Usage(10.2, 1000).is_busy_since(before, 2.0)
    assert Usage(10.0, 300_000).is_busy_since(before, 2.0)
    assert not Usage(0.0, 0).is_busy_since(before, 2.0), "a loader worker has ended"


def test_the_usage_of_children_counts() -> None:
    code = "import os, sys; os.write(1, os.urandom(1_000_000)); sys.stdin.read()"
    before = read_usage(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert len(child.stdout.read(1_000_000)) == 1_000_000
        after = read_usage(os.getpid())
    finally:
        child.stdin.close()
        child.stdout.close()
        child.wait()
    assert after.transferred - before.transferred >= 1_000_000
    assert after.cpu > before.cpu
    assert read_usage(2**22 + 1) == Usage(0.0, 0)


@pytest.mark.parametrize(
    ("channel", "text"),
    [
        ("hrtimer_nanosleep", "sleeping"),
        ("pipe_write", "waiting for the other end of a pipe"),
        ("wait_for_partner", "waiting for the other end of a pipe"),
        ("futex_wait_queue", "waiting for a lock"),
        ("do_wait", "waiting for a child process"),
        ("folio_wait_bit_common", "waiting for a disk"),
        ("rpc_wait_bit_killable", "waiting for a network disk"),
        ("unknown_to_us", ""),
        ("", ""),
    ],
)
def test_the_wait_in_the_kernel_is_described(channel: str, text: str, tmp_path: Path) -> None:
    assert describe_wait_channel(channel) == text
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "wchan").write_text(channel or "0")
    assert read_wait_channel(7, tmp_path) == channel
    assert read_wait_channel(8, tmp_path) == ""


def _stack(*frames: tuple[str, str]) -> str:
    lines = [f'  File "{file}", line 1 in {name}' for file, name in frames]
    return "\n".join(["Current thread 0x1 (most recent call first):", *lines, ""])


def test_the_stacks_show_what_a_rank_waits_for_before_the_kernel_does() -> None:
    loader = ("/lib/torch/utils/data/dataloader.py", "_try_get_data")
    assert describe_wait(_stack(("/lib/selectors.py", "select"), loader), "waiting for input") == LOADER_WAIT
    single = ("/lib/torch/utils/data/dataloader.py", "_next_data")
    assert describe_wait(_stack(("/me/data.py", "fetch"), single), "sleeping") == "sleeping"
    assert describe_wait(_stack(("/lib/threading.py", "wait")), "waiting for a lock") == "waiting for a lock or a queue"
    assert describe_wait(_stack(("/lib/torch/distributed/distributed_c10d.py", "broadcast")), "") == (
        "waiting for other ranks"
    )
