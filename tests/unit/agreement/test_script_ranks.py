"""The ranks that a script or a notebook starts itself: their variables, their commands and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import launcher.agreement.script_ranks as module
from launcher.agreement.script_ranks import in_notebook, is_script_rank, make_rank_variables, script_rank
from launcher.core.errors import AgreementError
from launcher.hardware.topology import Topology


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """This process's main module, which tests change."""
    made = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", made)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    return made


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_variables_of_a_rank_describe_a_complete_topology(rank: int) -> None:
    found = Topology.from_env(make_rank_variables(rank, 4, 29500), "here")
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (rank, 4, rank, 4)
    assert (found.node_rank, found.master_addr, found.master_port) == (0, "127.0.0.1", 29500)
    assert found.agent_store is False, "rank zero serves the store"


def test_a_script_is_no_notebook(main: types.ModuleType) -> None:
    main.__file__ = "/home/me/train.py"
    assert not in_notebook()


def test_a_process_without_a_script_is_a_notebook(main: types.ModuleType) -> None:
    assert not hasattr(main, "__file__")
    assert in_notebook()


def test_piped_code_is_a_notebook(main: types.ModuleType) -> None:
    main.__file__ = "<stdin>"
    assert in_notebook()


def test_a_jupyter_kernel_is_a_notebook(main: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    main.__file__ = "/usr/lib/python3/site-packages/ipykernel_launcher.py"
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    assert in_notebook()


@pytest.mark.parametrize(
    ("spec", "argv"),
    [
        (None, ["{folder}/train.py", "--lr", "1 2"]),
        ("my_pkg.train", ["-m", "my_pkg.train", "--lr", "1 2"]),
        ("my_pkg.__main__", ["-m", "my_pkg", "--lr", "1 2"]),
    ],
)
def test_the_same_command_starts_another_rank(
    main: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str | None, argv: list[str]
) -> None:
    script = tmp_path / "train.py"
    main.__file__ = str(script)
    main.__spec__ = None if spec is None else types.SimpleNamespace(name=spec)  # type: ignore[assignment]
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1 2"])
    # A script may have changed its working directory before it trains.
    monkeypatch.chdir("/")
    command, folder = module.build_rank_command(1)
    assert command[0] == sys.executable
    assert command[-len(argv) :] == [word.format(folder=tmp_path) for word in argv]
    assert folder is None, "where this process is"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, main: types.ModuleType) -> list[dict[str, str]]:
    """The environments of the processes that would be started; this process does not change."""
    made: list[dict[str, str]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
            assert command[0] == sys.executable
            made.append(env)
            self.pid = -1

        def wait(self, timeout: float | None = None) -> int:
            return 0

        def poll(self) -> int | None:
            return None

        terminate = kill = wait

    main.__file__ = __file__
    main.__spec__ = None
    monkeypatch.setattr(module.atexit, "register", lambda *_: None)
    monkeypatch.setattr(module.subprocess, "Popen", Process)
    monkeypatch.setattr(module, "_started", {})
    monkeypatch.setattr(module, "_ended", {})
    for name in (module._MARK, *make_rank_variables(0, 1, 0)):
        # Does not affect the next test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return made


def test_the_first_training_starts_the_other_ranks_and_marks_this_one(started: list[dict[str, str]]) -> None:
    assert not is_script_rank()
    own = script_rank(3)
    assert is_script_rank()
    places = [Topology.from_env(env, "here") for env in (own, *started)]
    assert [(p.rank, p.world_size) for p in places] == [(0, 3), (1, 3), (2, 3)]
    assert len({p.master_port for p in places}) == 1


def test_the_trainings_of_a_script_have_the_same_ranks(started: list[dict[str, str]]) -> None:
    assert script_rank(2) == script_rank(2)
    assert len(started) == 1


def test_another_rank_starts_nothing(started: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    first = script_rank(2)
    # The other process: the same environment.
    (environment,) = started
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = script_rank(0)
    assert (found["RANK"], found["MASTER_PORT"]) == ("1", first["MASTER_PORT"])
    assert len(started) == 1


@pytest.fixture
def hydra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Hydra's real record of the current job, set as its `main` sets it."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import open_dict

    def run(argv: list[str], number: int | None) -> None:
        from hydra import compose, initialize

        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        GlobalHydra.instance().clear()
        with initialize(version_base="1.3", config_path=None):
            own = [word for word in argv if word.startswith("hydra.")]
            overrides = [word for word in argv if "=" in word] if number is None else [f"+lr={number}", *own]
            config = compose(overrides=overrides, return_hydra_config=True)
        with open_dict(config.hydra):
            config.hydra.mode = RunMode.RUN if number is None else RunMode.MULTIRUN
            config.hydra.runtime.output_dir = str(tmp_path / "outputs" / f"{number}")
            config.hydra.runtime.cwd = str(tmp_path)
            if number is not None:
                config.hydra.job.num = number
        HydraConfig.instance().set_config(config)

    yield run
    HydraConfig.instance().cfg = None
    GlobalHydra.instance().clear()


def test_a_hydra_script_runs_again_in_its_output_folder(main: types.ModuleType, hydra: Any, tmp_path: Path) -> None:
    main.__file__, main.__spec__ = str(tmp_path / "train.py"), None
    hydra(["--config-name", "other", "+lr=0.1"], None)
    command, folder = module.build_rank_command(1)
    assert command[1:5] == [str(tmp_path / "train.py"), "--config-name", "other", "+lr=0.1"]
    assert f'hydra.run.dir="{tmp_path}/outputs/None"' in command
    assert "hydra.output_subdir=null" in command
    assert folder == str(tmp_path), "as hydra may have gone to the output folder"


def test_a_rank_of_a_hydra_sweep_has_only_the_overrides_of_its_job(
    main: types.ModuleType, hydra: Any, tmp_path: Path
) -> None:
    main.__file__, main.__spec__ = str(tmp_path / "train.py"), None
    hydra(["-m", "-cn=other", "--config-path", "conf", "+lr=1,2", "hydra.job.chdir=true"], 2)
    command, _ = module.build_rank_command(1)
    assert command[2:7] == ["-cn=other", "--config-path", "conf", "+lr=2", "hydra.job.chdir=true"]
    assert command[-1] == "hydra.mode=RUN"
    assert not {"-m", "+lr=1,2"} & set(command)


def test_each_job_of_a_sweep_has_its_own_ranks(started: list[dict[str, str]], hydra: Any) -> None:
    hydra(["-m", "+lr=0,1"], 0)
    ports = [script_rank(2)["MASTER_PORT"], script_rank(2)["MASTER_PORT"]]
    assert is_script_rank()
    hydra(["-m", "+lr=0,1"], 1)
    assert not is_script_rank()
    assert "RANK" not in os.environ, "this process is none of them any more"
    ports.append(script_rank(2)["MASTER_PORT"])
    assert len(started) == 2
    assert ports[0] == ports[1] != ports[2]


@pytest.mark.parametrize("ignores_sigterm", [False, True], ids=["at SIGTERM", "at SIGKILL"])
def test_a_script_rank_that_does_not_exit_is_killed(ignores_sigterm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    how = "SIG_IGN" if ignores_sigterm else "SIG_DFL"
    program = f"import signal\nsignal.signal(signal.SIGTERM, signal.{how})\nprint(flush=True)\nsignal.pause()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        monkeypatch.setattr(module, "_started", {1: process})
        monkeypatch.setattr(module, "_ended", {})
        monkeypatch.setattr(module, "_GRACE", 0.2)
        module.end_script_ranks(0.0, 0.2)
        assert process.returncode == -(signal.SIGKILL if ignores_sigterm else signal.SIGTERM)
        assert module._started == {}
        with pytest.raises(AgreementError, match=f"rank 1 of this script ended with exit code {process.returncode}, "):
            module.check_script_ranks()


def test_a_script_rank_that_ends_by_itself_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()
    monkeypatch.setattr(module, "_started", {1: process})
    monkeypatch.setattr(module, "_ended", {})
    module.end_script_ranks(60)
    assert process.returncode == 1, "it was not sent a signal"


def test_after_a_second_ctrl_c_no_script_rank_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if not interrupts:
                return super().wait(timeout)
            raise interrupts.pop()

    interrupts = [KeyboardInterrupt()]
    with Waiting([sys.executable, "-c", "import signal\nsignal.pause()"]) as process:
        monkeypatch.setattr(module, "_started", {1: process})
        monkeypatch.setattr(module, "_ended", {})
        with pytest.raises(KeyboardInterrupt):
            module.end_script_ranks(0.0)
        # Called at the end of the interpreter.
        module.end_script_ranks(0.0)
        process.kill()
        assert process.wait() == -signal.SIGTERM
