from __future__ import annotations

import linecache
from pathlib import Path

import torch

import launcher
from launcher.agent.hang_detection import (
    HangDetector,
    RankState,
    describe_hang,
    find_blocking_ranks,
    find_own_frame,
    is_in_collective,
    read_main_thread,
)
from launcher.process.heartbeat import BEFORE_TRAINING, UNKNOWN, Heartbeat

WAITING = """Thread 0x01 (most recent call first):
  File "/lib/python3.11/threading.py", line 324 in wait

Current thread 0x02 (most recent call first):
  File "/site-packages/torch/autograd/graph.py", line 979 in _engine_run_backward
  File "/site-packages/torch/autograd/__init__.py", line 395 in backward
  File "/home/me/model.py", line 12 in training_step
  File "<string>", line 1 in <module>
"""
SLEEPING = """Current thread 0x02 (most recent call first):
  File "/home/me/model.py", line 5 in fetch
  File "/home/me/model.py", line 12 in training_step
  File "/site-packages/torch/nn/parallel/distributed.py", line 1715 in forward
  File "<string>", line 1 in <module>
"""


def _beat(step: int, clock: float, collectives: int = UNKNOWN) -> Heartbeat:
    return Heartbeat(step, clock, collectives, True)


def test_old_heartbeats_of_all_ranks_are_a_hang() -> None:
    detector = HangDetector(10.0)
    assert detector.find_silence(109.0, {0: _beat(3, 100.0), 1: _beat(3, 90.0)}) is None
    assert detector.find_silence(111.0, {0: _beat(3, 100.0), 1: _beat(3, 90.0)}) == 11.0


def test_one_recent_heartbeat_or_none_at_all_is_not_a_hang() -> None:
    assert HangDetector(10.0).find_silence(1000.0, {0: _beat(3, 1.0), 1: _beat(3, 999.0)}) is None
    assert HangDetector(10.0).find_silence(1000.0, {0: None, 1: None}) is None


def test_the_default_limit_is_twenty_steps_and_at_least_ten_minutes() -> None:
    detector = HangDetector(None)
    assert detector.limit is None
    assert detector.find_silence(1e6, {0: _beat(BEFORE_TRAINING, 0.0)}) is None, "the step time is unknown"
    detector.find_silence(0.0, {0: _beat(1, 0.0)})
    detector.find_silence(5.0, {0: _beat(11, 5.0)})
    assert detector.limit == 600.0
    slow = HangDetector(None)
    slow.find_silence(0.0, {0: _beat(1, 0.0)})
    slow.find_silence(200.0, {0: _beat(3, 200.0)})
    assert slow.limit == 2000.0
    assert slow.find_silence(2100.0, {0: _beat(3, 200.0)}) is None
    assert slow.find_silence(2201.0, {0: _beat(3, 200.0)}) == 2001.0


def test_the_rank_with_fewer_collectives_blocks() -> None:
    states = {rank: RankState(_beat(3, 1.0, count), stacks=SLEEPING if count == 40 else WAITING)
              for rank, count in enumerate((41, 40, 41))}  # fmt: skip
    assert find_blocking_ranks(states) == {1: "in /home/me/model.py, line 5, in fetch"}


def test_a_stopped_process_comes_before_other_ranks() -> None:
    beat = _beat(3, 1.0, 41)
    states = {0: RankState(beat, stacks=WAITING), 1: RankState(beat, process_status="stopped")}
    assert find_blocking_ranks(states) == {1: "stopped by a signal (SIGSTOP)"}


def test_without_counts_the_stacks_decide() -> None:
    states = {0: RankState(_beat(3, 1.0), stacks=WAITING), 1: RankState(_beat(3, 1.0), stacks=SLEEPING)}
    assert list(find_blocking_ranks(states)) == [1]
    unresponsive = {0: RankState(_beat(3, 1.0), stacks=WAITING), 1: RankState(_beat(3, 1.0))}
    assert find_blocking_ranks(unresponsive) == {1: "not responding: it did not write its stacks"}


def test_if_all_ranks_look_the_same_none_is_blamed() -> None:
    waiting = {rank: RankState(_beat(3, 1.0, 41), stacks=WAITING) for rank in range(2)}
    assert find_blocking_ranks(waiting) == {}
    sleeping = {rank: RankState(_beat(3, 1.0, 41), stacks=SLEEPING) for rank in range(2)}
    assert find_blocking_ranks(sleeping) == {}


def test_the_position_is_read_from_the_main_thread() -> None:
    assert read_main_thread(WAITING)[0] == ("/site-packages/torch/autograd/graph.py", "979", "_engine_run_backward")
    assert read_main_thread("") == []
    assert is_in_collective(WAITING)
    assert not is_in_collective(SLEEPING)
    assert RankState(None, stacks=WAITING).doing.startswith("waiting in a collective (")
    assert RankState(None, process_status="disk-sleep").doing == "waiting in the kernel for a disk or a device"


def test_the_position_is_the_innermost_line_of_the_user() -> None:
    inner = [linecache.__file__, torch.__file__, launcher.__file__, "<frozen runpy>", "/venv/site-packages/w/_width.py"]
    own = [str(Path.cwd() / "train.py"), "/home/me/main.py"]
    frames = [(file, str(number), "f") for number, file in enumerate((*inner, *own))]
    assert find_own_frame(frames) == ("train.py", "5", "f")
    assert find_own_frame(frames[:5]) == frames[0], "no line is the user's"
    stacks = "Thread 1 (most recent call first):\n" + "".join(f'  File "{f}", line {n} in {g}\n' for f, n, g in frames)
    assert RankState(None, stacks=stacks).doing == "in train.py, line 5, in f"


def test_a_hang_is_described_with_the_blocking_ranks_and_the_stacks() -> None:
    assert describe_hang(20.4, [1], Path("/r/hang-1")) == (
        "hang: no heartbeat from any rank for 20 s; the other ranks wait for rank 1; stacks of all ranks: /r/hang-1"
    )
    assert describe_hang(20.4, [1, 3], None).endswith("the other ranks wait for ranks 1, 3")
    assert describe_hang(20.4, [1], None, has_steps=False).startswith(
        "hang: no rank has entered a collective for 20 s;"
    )
    assert describe_hang(20.4, [], None).endswith("cannot determine which rank blocks the others")
