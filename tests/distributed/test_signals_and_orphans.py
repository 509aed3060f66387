"""Signals to the agent save and stop all ranks; after any failure no process remains."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pty
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.agent.signals import to_rank_signal
from launcher.core.errors import describe_stop_signal
from launcher.core.event_text import name_stop_reason
from tests.support import warm
from tests.support.processes import Finished, launcher, run, run_warm, session_processes
from tests.support.runs import PERSISTENT, TOY, events_of, toy_env

pytestmark = pytest.mark.slow
SETTINGS = (*TOY, "--global_batch_size", "8", "--trainer.max_epochs", "4000", "--trainer.log_every_n_steps", "1",
            "--name", "it", "--devices", "2")  # fmt: skip


def _send_at_step(number: int, send: Callable[[int], None]) -> Callable[[str, int], None]:
    """Call `send` once with the agent's process id, at rank zero's line of step `number`."""
    sent: list[str] = []

    def on_line(line: str, agent: int) -> None:
        if line.startswith(f"step {number}/") and not sent:
            sent.append(line)
            send(agent)

    return on_line


def _fit(
    cwd: Path, send: Callable[[int], None], *arguments: str, start: Callable[..., Finished] = run_warm
) -> Finished:
    env = toy_env(cwd / "trace")
    return start(launcher("fit", *SETTINGS, *arguments), cwd, env=env, timeout=120, on_line=_send_at_step(4, send))


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140), (signal.SIGHUP, 129)],
)
def test_a_signal_to_the_agent_only_saves_on_all_ranks_at_the_same_step(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    output = _fit(tmp_path, lambda agent: os.kill(agent, number)).check(code).output

    directory = tmp_path / "runs" / "it"
    interrupted = events_of(directory, "interrupted")
    assert {event["rank"] for event in interrupted} == {0, 1}
    assert len({event["step"] for event in interrupted}) == 1
    (memory,) = events_of(directory, "memory")
    assert (sorted(memory["ranks"]), memory["step"]) == ([0, 1], interrupted[0]["step"])
    stopped = f"stopped by {describe_stop_signal(number)} after step {interrupted[0]['step']}; saved runs/it/"
    assert output.count(stopped) == 1, "once for all ranks"
    assert "--name it --resume auto" in output
    reason = name_stop_reason(to_rank_signal(number))
    assert {(event["reason"], event["second"]) for event in interrupted} == {(reason, False)}
    assert (directory / "checkpoints" / "last.ckpt").exists()
    assert "failed first" not in output


def test_ctrl_c_at_the_terminal_reaches_the_ranks_once(tmp_path: Path) -> None:
    output = _fit(tmp_path, lambda group: os.killpg(group, signal.SIGINT)).check(130).output
    assert output.count("saving at the next step boundary") == 1
    assert "ending at once" not in output


def test_a_second_signal_ends_the_ranks_in_the_middle_of_a_step(tmp_path: Path) -> None:
    # Rank one sleeps in step 3, so the first Ctrl-C does not end the run.
    arguments = ("--model", "tests.support.faulty.Faulty", "--model.fault", "sleep", "--model.at", "5")

    def again(line: str, agent: int) -> None:
        if line.startswith("step 5/"):
            os.kill(agent, signal.SIGINT)
        if "saving at the next step boundary" in line:
            # A second one within half a second counts as the same Ctrl-C, so keep sending.
            person = threading.Thread(target=_press_until_it_ends, args=(os.pidfd_open(agent),), daemon=True)
            person.start()

    env = toy_env(tmp_path / "trace")
    finished = run_warm(launcher("fit", *SETTINGS, *arguments), tmp_path, env=env, timeout=120, on_line=again)
    finished.check(130)
    assert not (tmp_path / "runs/it/checkpoints/last.ckpt").exists()


def _press_until_it_ends(agent: int) -> None:
    """Send Ctrl-C repeatedly through a process descriptor, because the process id may be reused."""
    try:
        while not select.select([agent], [], [], 0.05)[0]:
            signal.pidfd_send_signal(agent, signal.SIGINT)
    except ProcessLookupError:
        pass  # it has ended
    finally:
        os.close(agent)


def test_no_process_remains_when_the_agent_is_killed(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    titles = set[str]()

    def kill_agent(agent: int) -> None:
        # A stopped rank cannot end itself.
        below = [pid for pid, command in session_processes(agent) if command.startswith("launcher: ") and pid != agent]
        seen.append([str(pid) for pid in below])
        titles.update(command.rstrip() for _, command in session_processes(agent) if command.startswith("launcher: "))
        # The workers started last.
        os.kill(below[2], signal.SIGSTOP)
        os.kill(agent, signal.SIGKILL)

    finished = _fit(tmp_path, kill_agent, *PERSISTENT, start=run)
    assert finished.code == -signal.SIGKILL
    assert len(seen[0]) == 7, "the fork server, its two ranks, and two loader workers of each"
    roles = ["agent", "fork server", *(f"rank {rank} of 2" for rank in range(2)),
             *(f"loader worker {worker} of rank {rank}" for worker in range(2) for rank in range(2))]  # fmt: skip
    # The server starts before the run has a name.
    assert titles == {f"launcher: {role}{'' if role == 'fork server' else ' (run it)'}" for role in roles}
    deadline = time.monotonic() + 30
    while (left := [p for p in map(int, seen[0]) if _runs(p)]) and time.monotonic() < deadline:
        select.select([], [], [], 0.05)
    assert not left


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_killed_fork_server_is_a_failure_and_the_restart_works(tmp_path: Path) -> None:
    def kill_server(agent: int) -> None:
        children = [pid for pid, command in session_processes(agent) if command.startswith("launcher: fork server")]
        os.kill(min(children), signal.SIGKILL)

    arguments = ("--max-restarts", "1", "--checkpoint.every_n_steps", "1", "--trainer.max_epochs", "3")
    output = _fit(tmp_path, kill_server, *arguments, start=run).check().output
    assert "the rank or its fork server was killed" in output
    assert events_of(tmp_path / "runs" / "it", "finished")[0]["step"] == 24


@contextlib.contextmanager
def _terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    try:
        yield master, slave
    finally:
        for descriptor in (master, slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def test_a_closed_terminal_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    with _terminal() as (master, slave):
        env = {**os.environ, **toy_env(tmp_path / "trace"), "TERM": "dumb"}
        arguments = ("--trainer.enable_progress_bar", "false")
        process = warm.start(launcher("fit", *SETTINGS, *arguments)[1:], tmp_path, env, slave, terminal=True)
        try:
            os.close(slave)
            trace = tmp_path / "trace-1"
            while process.poll() is None and not (trace.exists() and len(trace.read_text().splitlines()) > 5):
                if select.select([master], [], [], 0.05)[0]:
                    os.read(master, 65536)
            os.close(master)
            assert process.wait(60) == 128 + signal.SIGHUP
        finally:
            process.kill()
    directory = tmp_path / "runs" / "it"
    assert {event["rank"] for event in events_of(directory, "interrupted")} == {0, 1}
    assert (directory / "checkpoints" / "last.ckpt").exists()


def test_a_full_disk_loses_log_lines_but_does_not_end_training(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode and not os.environ.get("CI"):
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    mounted.check_returncode()
    arguments = ("--runs_dir", "disk/runs", "--trainer.enable_checkpointing", "false", "--model",
                 "tests.support.faulty.Faulty", "--model.fault", "fill", "--trainer.max_epochs", "1")  # fmt: skip
    try:
        for rank in ("0", "1"):
            trace = tmp_path / f"trace-by-{rank}"
            command = launcher("fit", *SETTINGS, *arguments, "--model.by_rank", rank, "--name", f"by-{rank}")
            run_warm(command, tmp_path, env=toy_env(trace)).check()
            assert len(Path(f"{trace}-{rank}").read_text().splitlines()) == 8
            for log in (disk / "runs" / f"by-{rank}" / "logs").iterdir():
                log.write_text("")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_lines_of_shown_ranks_have_a_number_and_hidden_ranks_are_in_files_only(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(
        "import sys\nfrom tests.support.toy import Toy\n\n\nclass Talk(Toy):\n    def on_fit_start(self):\n"
        "        print('out of', self.global_rank)\n        print('err of', self.global_rank, file=sys.stderr)\n"
    )
    arguments = ("--model", "talk.Talk", "--trainer.max_epochs", "1", "--devices", "3", "--global_batch_size", "12")
    command = launcher("fit", *SETTINGS, *arguments, "--terminal-ranks", "0,2")
    output = run_warm(command, tmp_path, env=toy_env(tmp_path / "trace")).check().output

    lines = output.splitlines()
    for line in ("out of 0", "err of 0", "[rank 2] out of 2", "[rank 2] err of 2"):
        assert lines.count(line) == 1, output
    assert "of 1" not in output
    for rank in range(3):
        log = (tmp_path / "runs/it/logs" / f"rank-{rank}.log").read_text().splitlines()
        assert log.count(f"out of {rank}") == log.count(f"err of {rank}") == 1


def test_every_rank_has_its_variables_from_the_first_line_and_starts_processes_normally(tmp_path: Path) -> None:
    # Lightning reads its rank on import, and the fork server has none.
    (tmp_path / "helper.py").write_text(
        "import os\nfrom launcher.agent.fork_server_process import RANK_VARIABLES\n"
        "SEEN = {name: os.environ.get(name) for name in RANK_VARIABLES}\n"
    )
    (tmp_path / "mine.py").write_text(
        "import multiprocessing, os\nimport torchmetrics.utilities.prints as prints\nimport helper\n"
        "from lightning.pytorch.utilities import rank_zero_only\nfrom tests.support.toy import Toy, ToyData\n"
        "RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ('RANK', 'LOCAL_RANK'))\n\n\n"
        "class Mine(Toy):\n    def __init__(self):\n        super().__init__()\n"
        "        print('rank_zero_only', rank_zero_only.rank, prints.rank_zero_only.rank)\n"
        "        print('start method', multiprocessing.get_start_method())\n"
        "        print('module', RANK, LOCAL_RANK)\n"
        "        print('helper', {name: os.environ.get(name) for name in helper.SEEN} == helper.SEEN)\n"
    )
    (tmp_path / "theirs.py").write_text(
        "import os\nfrom tests.support.toy import ToyData\nRANK = os.environ['RANK']\n\n\n"
        "class Data(ToyData):\n    def setup(self, stage):\n        super().setup(stage)\n        print('data', RANK)\n"
    )
    arguments = ("--model", "mine.Mine", "--data", "theirs.Data", "--trainer.max_epochs", "1")
    run(launcher("fit", *SETTINGS, *arguments), tmp_path, env=toy_env(tmp_path / "trace")).check()
    for rank in range(2):
        log = (tmp_path / "runs/it/logs" / f"rank-{rank}.log").read_text().splitlines()
        assert f"rank_zero_only {rank} {rank}" in log
        for line in (f"module {rank} {rank}", f"data {rank}", "helper True"):
            assert line in log
        # The agent's fork server must not start loader workers.
        assert f"start method {multiprocessing.get_start_method()}" in log


def test_a_long_tmpdir_and_a_low_limit_of_open_files_work(tmp_path: Path) -> None:
    # The address of a Unix socket has at most 107 bytes; the fork server and loader workers use one.
    long = tmp_path / ("long" * 30)
    long.mkdir()
    (tmp_path / "mine.py").write_text(
        "import resource\nfrom tests.support.toy import Toy\n\n\nclass Mine(Toy):\n    def on_train_start(self):\n"
        "        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n        print('raised', soft == hard)\n"
    )
    arguments = ("--model", "mine.Mine", "--trainer.max_epochs", "1", "--data.workers", "1")
    command = ["bash", "-c", 'ulimit -Sn 256; exec "$@"', "bash", *launcher("fit", *SETTINGS, *arguments)]
    run(command, tmp_path, env={**toy_env(tmp_path / "trace"), "TMPDIR": str(long)}).check()
    for rank in range(2):
        assert "raised True" in (tmp_path / "runs/it/logs" / f"rank-{rank}.log").read_text().splitlines()
    assert [path.name for path in long.iterdir() if path.name.startswith(("launcher-", "pymp-"))] == []


def test_a_port_in_use_is_reported_with_what_to_do(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = ("--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", endpoint)
        output = (
            run_warm(launcher("fit", *SETTINGS, *arguments), tmp_path, env=toy_env(tmp_path / "trace")).check(2).output
        )
    assert f"error: --rdzv-endpoint {endpoint}: cannot serve it from" in output
    assert "Traceback" not in output


def test_threads_that_the_users_module_starts_on_import_run_in_every_rank(tmp_path: Path) -> None:
    (tmp_path / "threads.py").write_text(
        "import threading\nfrom tests.support.toy import Toy\n"
        "own = threading.Thread(target=threading.Event().wait, daemon=True, name='the-users-own')\nown.start()\n\n\n"
        "class Threaded(Toy):\n    def on_train_start(self):\n        assert own.is_alive()\n"
    )
    arguments = ("--model", "threads.Threaded", "--trainer.max_epochs", "1")
    output = run_warm(launcher("fit", *SETTINGS, *arguments), tmp_path, env=toy_env(tmp_path / "trace")).check().output
    assert "notice: importing" not in output
    assert events_of(tmp_path / "runs/it", "finished")[0]["step"] == 8


@pytest.mark.parametrize("ending", ["os._exit(5)", "raise RuntimeError('no licence')", "import sys; sys.exit(4)"])
@pytest.mark.parametrize("has_class", [False, True])
def test_a_module_that_ends_its_process_on_import_is_reported(tmp_path: Path, ending: str, *, has_class: bool) -> None:
    (tmp_path / "ends.py").write_text(f"import os\n{ending}\n" + "\n\nclass Model: ...\n" * has_class)
    arguments = ("--model", "ends.Model")
    finished = run_warm(launcher("fit", *SETTINGS, *arguments), tmp_path, env=toy_env(tmp_path / "trace"))
    if "_exit" in ending and has_class:
        # A rank imports it.
        finished.check(5)
        assert "failed first: exited with code 5 before training started" in finished.output
    else:
        finished.check(2)
        assert "ends.Model does not import: " in finished.output


@pytest.mark.parametrize("command", ["fit", "plan", "submit", "init"])
def test_each_command_reports_a_module_that_crashes_its_process(tmp_path: Path, command: str) -> None:
    (tmp_path / "ends.py").write_text("import ctypes\nctypes.string_at(0)\n")
    options = {"fit": SETTINGS, "submit": ("--dry-run",), "init": ("--yes", "--output", "made.yaml")}.get(command, ())
    finished = run_warm(launcher(command, *options, "--model", "ends.Modle"), tmp_path, env=toy_env(tmp_path / "trace"))
    place = tmp_path / "ends.py"
    assert f"while it imported ends.Modle: Segmentation fault ({place}, line 2)" in finished.check(-11).output
