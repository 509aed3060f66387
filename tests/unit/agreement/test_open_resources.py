"""What a training keeps open for its Trainer is closed once, by the next training or at exit, never by a fork."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

import launcher.agreement.process_group as groups
import launcher.process.open_resources as module
from launcher.agreement.process_group import GroupSettings, open_store, process_group
from launcher.agreement.script_ranks import find_free_port, make_rank_variables
from launcher.core.errors import TopologyError
from launcher.hardware.topology import Topology
from launcher.process.open_resources import close_kept_open, keep_open


@pytest.fixture(autouse=True)
def nothing_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_kept", [])
    monkeypatch.setattr(groups, "_stores", {})
    yield
    close_kept_open()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def place() -> Topology:
    return Topology.from_env(make_rank_variables(0, 1, find_free_port()), "here")


def test_the_next_training_closes_each_once_the_last_first() -> None:
    closed: list[str] = []
    keep_open(lambda: closed.append("group"))
    keep_open(lambda: closed.append("W&B"))
    close_kept_open()
    close_kept_open()
    assert closed == ["W&B", "group"]


def test_a_fork_closes_nothing() -> None:
    program = """
import os
from launcher.process.open_resources import close_kept_open, keep_open
keep_open(lambda: os.write(1, f"closed by {os.getpid()}".encode()))
process = os.fork()
if not process:
    close_kept_open()
    os._exit(0)
os.waitpid(process, 0)
os.write(1, f"parent {os.getpid()} ".encode())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    _, pid, *closed = ended.stdout.split()
    assert closed == ["closed", "by", pid]


def test_the_end_of_the_interpreter_closes_all() -> None:
    program = (
        "from launcher.process.open_resources import keep_open; keep_open(lambda: print('closed')); print('script')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout.split() == ["script", "closed"]


@pytest.mark.parametrize("stays", [True, False])
def test_a_group_stays_open_until_the_next_training_on_request(place: Topology, stays: bool) -> None:
    store = open_store(place, 5)
    for attempt in ("first", "second"):
        close_kept_open()
        with process_group(store, place, GroupSettings("gloo", attempt, 5, stays_open=stays)):
            dist.barrier()
        assert dist.is_initialized() is stays
    close_kept_open()
    assert not dist.is_initialized()


def test_a_failed_training_closes_the_group(place: Topology) -> None:
    def train() -> None:
        with process_group(open_store(place, 5), place, GroupSettings("gloo", "a", 5, stays_open=True)):
            raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        train()
    assert not dist.is_initialized()


def test_ctrl_c_ends_the_wait_for_a_rank_that_does_not_come(place: Topology) -> None:
    store = dist.HashStore()

    def press_once_it_waits() -> None:
        while store.add("launcher/a/arrived", 0) == 0:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    person = threading.Thread(target=press_once_it_waits, daemon=True)
    two = dataclasses.replace(place, world_size=2)
    person.start()
    with pytest.raises(KeyboardInterrupt), process_group(store, two, GroupSettings("gloo", "a", 30)):
        raise AssertionError("the other rank has not come")
    person.join()
    assert not dist.is_initialized()


def test_the_scripts_own_group_is_used_and_stays(place: Topology) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with process_group(open_store(place, 5), place, GroupSettings("gloo", "a", 5)):
        dist.barrier()
    assert dist.is_initialized(), "the script destroys it"
    two = Topology.from_env(make_rank_variables(1, 2, find_free_port()), "here")
    with (
        pytest.raises(TopologyError, match=r"rank 0 of 1 in a process group that exists already, and rank 1 of 2"),
        process_group(dist.HashStore(), two, GroupSettings("gloo", "a", 5)),
    ):
        pass


def test_each_training_of_a_process_has_its_own_prefix_in_one_store(place: Topology) -> None:
    first = open_store(place, 5)
    first.set("run", "first")
    second = open_store(place, 7)
    assert not second.check(["run"]), "another run's name would be taken for this one's"
    second.set("run", "second")
    assert (first.get("run"), second.get("run")) == (b"first", b"second")
    assert not open_store(place, 5).check(["run"])
