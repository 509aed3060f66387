from __future__ import annotations

from launcher.agent.hang_detection import HangWatch, RankState, in_collective, main_thread_frame, ranks_behind
from launcher.process.heartbeat import BEFORE_TRAINING, UNKNOWN, Heartbeat

WAITING = """Thread 0x01 (most recent call first):
  File "/lib/python3.11/threading.py", line 324 in wait

Current thread 0x02 (most recent call first):
  File "/site-packages/torch/autograd/graph.py", line 979 in _engine_run_backward
  File "/site-packages/torch/autograd/__init__.py", line 395 in backward
  File "/home/me/model.py", line 12 in training_step
  File "<string>", line 1 in <module>
"""
ASLEEP = """Current thread 0x02 (most recent call first):
  File "/home/me/model.py", line 5 in fetch
  File "/home/me/model.py", line 12 in training_step
  File "/site-packages/torch/nn/parallel/distributed.py", line 1715 in forward
  File "<string>", line 1 in <module>
"""


def _beat(step: int, clock: float, collectives: int = UNKNOWN) -> Heartbeat:
    return Heartbeat(step, clock, collectives, True)


def test_silence_of_all_ranks_beyond_the_limit_is_a_hang() -> None:
    watch = HangWatch(10.0)
    assert watch.silence(109.0, {0: _beat(3, 100.0), 1: _beat(3, 90.0)}) is None
    assert watch.silence(111.0, {0: _beat(3, 100.0), 1: _beat(3, 90.0)}) == 11.0


def test_one_rank_that_speaks_is_enough_and_nobody_yet_is_no_hang() -> None:
    assert HangWatch(10.0).silence(1000.0, {0: _beat(3, 1.0), 1: _beat(3, 999.0)}) is None
    assert HangWatch(10.0).silence(1000.0, {0: None, 1: None}) is None


def test_the_default_limit_is_twenty_steps_and_never_below_ten_minutes() -> None:
    watch = HangWatch(None)
    assert watch.limit is None
    assert watch.silence(1e6, {0: _beat(BEFORE_TRAINING, 0.0)}) is None, "nothing is known of the steps"
    watch.silence(0.0, {0: _beat(1, 0.0)})
    watch.silence(5.0, {0: _beat(11, 5.0)})
    assert watch.limit == 600.0
    slow = HangWatch(None)
    slow.silence(0.0, {0: _beat(1, 0.0)})
    slow.silence(200.0, {0: _beat(3, 200.0)})
    assert slow.limit == 2000.0
    assert slow.silence(2100.0, {0: _beat(3, 200.0)}) is None
    assert slow.silence(2201.0, {0: _beat(3, 200.0)}) == 2001.0


def test_the_rank_with_fewer_collectives_is_behind() -> None:
    states = {rank: RankState(_beat(3, 1.0, count), stacks=ASLEEP if count == 40 else WAITING)
              for rank, count in enumerate((41, 40, 41))}  # fmt: skip
    assert ranks_behind(states) == {1: "in /home/me/model.py, line 5, in fetch"}


def test_a_stopped_process_is_named_before_all_others() -> None:
    states = {0: RankState(_beat(3, 1.0, 41), stacks=WAITING), 1: RankState(_beat(3, 1.0, 41), process_state="T")}
    assert ranks_behind(states) == {1: "stopped by a signal (SIGSTOP)"}


def test_without_counts_the_stacks_tell() -> None:
    states = {0: RankState(_beat(3, 1.0), stacks=WAITING), 1: RankState(_beat(3, 1.0), stacks=ASLEEP)}
    assert list(ranks_behind(states)) == [1]
    silent = {0: RankState(_beat(3, 1.0), stacks=WAITING), 1: RankState(_beat(3, 1.0))}
    assert ranks_behind(silent) == {1: "silent: it did not even write its stacks"}


def test_where_all_are_alike_nobody_is_accused() -> None:
    waiting = {rank: RankState(_beat(3, 1.0, 41), stacks=WAITING) for rank in range(2)}
    assert ranks_behind(waiting) == {}
    asleep = {rank: RankState(_beat(3, 1.0, 41), stacks=ASLEEP) for rank in range(2)}
    assert ranks_behind(asleep) == {}


def test_stacks_are_read_from_the_main_thread() -> None:
    assert main_thread_frame(WAITING) == ("/site-packages/torch/autograd/graph.py", "979", "_engine_run_backward")
    assert main_thread_frame("") is None
    assert in_collective(WAITING)
    assert not in_collective(ASLEEP)
    assert RankState(None, stacks=WAITING).doing.startswith("waiting in a collective (")
    assert RankState(None, process_state="D").doing == "waiting in the kernel for a disk or a device"
