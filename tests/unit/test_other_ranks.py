"""The ranks that a script or a notebook starts itself: their variables, their commands, and that none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import launcher.other_ranks as module
from launcher.errors import TopologyError, TrainingError
from launcher.other_ranks import forked_ranks, in_notebook, is_script_rank, rank_variables, script_rank
from launcher.topology import Topology


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """This process's main module, to be dressed up."""
    made = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", made)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    return made


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_variables_of_a_rank_are_a_whole_topology(rank: int) -> None:
    found = Topology.from_env(rank_variables(rank, 4, 29500), "here")
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (rank, 4, rank, 4)
    assert (found.node_rank, found.master_addr, found.master_port) == (0, "127.0.0.1", 29500)
    assert found.agent_store is False, "rank zero serves the store"


def test_a_script_is_no_notebook(main: types.ModuleType) -> None:
    main.__file__ = "/home/me/train.py"
    assert not in_notebook()


def test_a_process_without_a_script_is_one(main: types.ModuleType) -> None:
    assert not hasattr(main, "__file__")
    assert in_notebook()


def test_code_that_is_piped_in_is_one(main: types.ModuleType) -> None:
    main.__file__ = "<stdin>"
    assert in_notebook()


def test_a_kernel_of_jupyters_is_one_whatever_started_it(
    main: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    main.__file__ = "/usr/lib/python3/site-packages/ipykernel_launcher.py"
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    assert in_notebook()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (None, ["{folder}/train.py", "--lr", "1 2"]),
        ("my_pkg.train", ["-m", "my_pkg.train", "--lr", "1 2"]),
        ("my_pkg.__main__", ["-m", "my_pkg", "--lr", "1 2"]),
    ],
)
def test_the_same_words_start_another_rank(
    main: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str | None, words: list[str]
) -> None:
    script = tmp_path / "train.py"
    main.__file__ = str(script)
    main.__spec__ = None if spec is None else types.SimpleNamespace(name=spec)  # type: ignore[assignment]
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1 2"])
    # A script may have gone elsewhere before it trains.
    monkeypatch.chdir("/")
    assert module._this_command()[0] == sys.executable
    assert module._this_command()[-len(words) :] == [word.format(folder=tmp_path) for word in words]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, main: types.ModuleType) -> Iterator[list[dict[str, str]]]:
    """The environments of the processes that would be started; this process stays what it was."""
    made: list[dict[str, str]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
            assert command[0] == sys.executable
            made.append(env)
            self.pid = -1

        def poll(self) -> int:
            return 0

        wait = poll

    main.__file__ = __file__
    main.__spec__ = None
    monkeypatch.setattr(module.atexit, "register", lambda *_: None)
    monkeypatch.setattr(module.subprocess, "Popen", Process)
    monkeypatch.setattr(module, "_started", [])
    yield made
    module._ports.cache_clear()


def test_the_first_training_starts_the_other_ranks_and_marks_this_one(started: list[dict[str, str]]) -> None:
    assert not is_script_rank()
    own = script_rank(3)
    assert is_script_rank()
    places = [Topology.from_env(env, "here") for env in (own, *started)]
    assert [(p.rank, p.world_size) for p in places] == [(0, 3), (1, 3), (2, 3)]
    assert len({p.master_port for p in places}) == 1


def test_each_training_has_a_port_of_its_own_and_starts_nothing_more(started: list[dict[str, str]]) -> None:
    ports = [script_rank(2)["MASTER_PORT"] for _ in range(32)]
    assert len(started) == 1
    assert len(set(ports)) == 32
    with pytest.raises(TopologyError, match="trains at most 32 times on several ranks; start it with torchrun"):
        script_rank(2)


def test_another_rank_goes_through_the_same_ports(
    started: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = [script_rank(2)["MASTER_PORT"] for _ in range(3)]
    # The other process: the same environment, and nothing taken yet.
    (environment,) = started
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    module._ports.cache_clear()
    found = [script_rank(0) for _ in range(3)]
    assert [env["MASTER_PORT"] for env in found] == ports
    assert {env["RANK"] for env in found} == {"1"}
    assert len(started) == 1


def is_gone(process: int) -> bool:
    """Whether a child of this process has been waited for."""
    try:
        os.waitpid(process, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def note(folder: Path, env: Mapping[str, str]) -> Path:
    return folder / env["RANK"]


def test_forked_ranks_do_their_work_and_are_waited_for(tmp_path: Path) -> None:
    def work(env: Mapping[str, str]) -> None:
        note(tmp_path, env).write_text(f"{os.getpid()} {env['WORLD_SIZE']} {env['MASTER_PORT']}")

    with forked_ranks(3, work) as own:
        note(tmp_path, own).write_text(f"{os.getpid()} {own['WORLD_SIZE']} {own['MASTER_PORT']}")
    written = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert written[0][0] == str(os.getpid())
    assert len({pid for pid, _, _ in written}) == 3
    assert len({tuple(rest) for _, *rest in written}) == 1
    assert all(is_gone(int(pid)) for pid, _, _ in written[1:])


def test_the_failure_of_rank_zero_ends_the_forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE", 0.2)
    read, write = os.pipe()

    def work(env: Mapping[str, str]) -> None:
        # One of them goes at SIGTERM, the other has its own ideas.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if env["RANK"] == "1" else signal.SIG_IGN)
        os.write(write, f"{os.getpid()}\n".encode())
        while True:
            signal.pause()

    forks: list[int] = []

    def train() -> None:
        with os.fdopen(read) as lines, forked_ranks(3, work):
            forks.extend(int(lines.readline()) for _ in range(2))
            raise ValueError("rank zero's own")

    with pytest.raises(ValueError, match=r"^rank zero's own$"):
        train()
    os.close(write)
    assert all(map(is_gone, forks))


def test_a_forked_rank_that_fails_alone_is_told_with_its_own_words(capfd: pytest.CaptureFixture[str]) -> None:
    parent = os.getpid()

    def work(env: Mapping[str, str]) -> None:
        if env["RANK"] == "2":
            raise ValueError("the other rank's own mistake")

    with pytest.raises(TrainingError, match=r"^rank 2 ended with exit code 1; the run's logs/"), forked_ranks(3, work):
        pass
    assert os.getpid() == parent
    assert "ValueError: the other rank's own mistake" in capfd.readouterr().err


@pytest.mark.parametrize("deaf", [False, True], ids=["at SIGTERM", "at SIGKILL"])
def test_a_script_rank_that_does_not_end_is_ended(deaf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    how = "SIG_IGN" if deaf else "SIG_DFL"
    program = f"import signal\nsignal.signal(signal.SIGTERM, signal.{how})\nprint(flush=True)\nsignal.pause()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        monkeypatch.setattr(module, "_started", [process])
        monkeypatch.setattr(module, "_GRACE", 0.2)
        module.end_script_ranks(0.0)
        assert process.returncode == -(signal.SIGKILL if deaf else signal.SIGTERM)
        assert module._started == []


def test_a_script_rank_that_ends_by_itself_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()
    monkeypatch.setattr(module, "_started", [process])
    module.end_script_ranks(60)
    assert process.returncode == 1, "it was not sent a signal"
