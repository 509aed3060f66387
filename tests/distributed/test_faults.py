"""Failures of a rank: the first failed rank is reported, its exit code is returned, and no process remains."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.memory_group import NoMemoryGroupError, memory_group
from tests.support.processes import Finished, launcher, run_warm
from tests.support.runs import PERSISTENT, TOY, events_of, read_trace, toy_env

pytestmark = pytest.mark.slow
SETTINGS = ("--model", "tests.support.faulty.Faulty", *TOY[2:], "--global_batch_size", "8", "--trainer.max_epochs", "1",
            "--name", "it", "--devices", "2", *PERSISTENT)  # fmt: skip


def _fit(cwd: Path, *arguments: str, timeout: float = 150) -> Finished:
    return run_warm(launcher("fit", *SETTINGS, *arguments), cwd, env=toy_env(cwd / "trace"), timeout=timeout)


@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [
        ("kill", 137, r"killed by SIGKILL \(signal 9\) at step 3"),
        ("segfault", 139, r"killed by SIGSEGV \(signal 11\) at step 3"),
        ("exit 3", 3, r"exited with code 3 at step 3"),
        ("raise", 1, r"ValueError: the user's own mistake at step 3"),
    ],
)
def test_the_first_failed_rank_is_reported_once_with_its_log_and_its_exit_code(
    tmp_path: Path, fault: str, code: int, text: str
) -> None:
    output = _fit(tmp_path, "--model.fault", fault).check(code).output

    account = output[output.index("error: ") :]
    assert re.match(rf"error: rank 1 \(\S+\) failed first: {text}\n", account), output
    assert re.search(r"^  rank 0 \(\S+\): ", account, re.M)
    assert output.count("failed first") == 1
    assert "no restart: --max-restarts is 0" in account
    (event,) = events_of(tmp_path / "runs" / "it", "rank_failed")
    assert (event["rank"], event["step"], event["restart"]) == (1, 3, False)
    if fault == "raise":
        assert "| ValueError: the user's own mistake" in account
        assert "tests/support/faulty.py" in account
        assert account.count("Traceback") == 0, "the traceback of the lost connection is only in that rank's log"
        assert "closed by peer" in (tmp_path / "runs/it/logs/rank-0.log").read_text()
    if fault == "segfault":
        assert 'faulty.py", line' in account, "the end of the log has the position"


@pytest.fixture
def full_group() -> Iterator[Path]:
    """A control group that holds 64 MiB."""
    try:
        with memory_group(f"launcher-test-{os.getpid()}", 64 * 2**20) as group:
            yield group.path
    except NoMemoryGroupError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def test_a_rank_that_the_kernel_kills_for_memory_is_reported_as_out_of_memory(tmp_path: Path, full_group: Path) -> None:
    env = {**toy_env(tmp_path / "trace"), "MEMORY_GROUP": str(full_group)}
    command = launcher("fit", *SETTINGS, "--model.fault", "eat memory")
    output = run_warm(command, tmp_path, env=env, timeout=150).check(137).output

    killed = r"killed by the kernel because the host ran out of memory \(SIGKILL\) at step 3"
    expected = rf"error: rank 1 \(\S+\) failed first: {killed}"
    assert re.search(expected, output), output
    (event,) = events_of(tmp_path / "runs" / "it", "rank_failed")
    assert event["out_of_memory"] is True


def test_an_exception_before_the_process_group_exists_is_reported_with_its_rank(tmp_path: Path) -> None:
    output = _fit(tmp_path, "--model", "tests.support.faulty.FailsEarly").check(1).output

    assert re.search(r"error: rank 1 \(\S+\) failed first: OSError: a licence server", output), output
    assert "before training started" in output


def test_restarts_continue_from_the_last_step_with_every_sample_in_the_same_run(tmp_path: Path) -> None:
    arguments = ("--model.fault", "kill", "--model.by_rank", "0", "--model.times", "3", "--max-restarts", "5",
                 "--checkpoint.every_n_steps", "2")  # fmt: skip
    output = _fit(tmp_path, *arguments).check().output

    directory = tmp_path / "runs" / "it"
    assert [e["verdict"][:12] for e in events_of(directory, "rank_failed")] == [
        f"restart {n} of 5"[:12] for n in (1, 2, 3)
    ]
    assert output.count("failed first") == 3
    started = events_of(directory, "run_started")
    assert len({event["attempt"] for event in started}) == len(started) == 4
    assert events_of(directory, "finished")[0]["step"] == 8
    # Only the step in which the rank was killed begins again, then the rest follows.
    assert [step for step, _, _ in read_trace(tmp_path / "trace", 1)] == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7]


def test_restarts_are_counted_up_to_the_limit(tmp_path: Path) -> None:
    arguments = (
        "--model.fault",
        "kill",
        "--model.times",
        "9",
        "--max-restarts",
        "1",
        "--checkpoint.every_n_steps",
        "2",
    )
    output = _fit(tmp_path, *arguments).check(137).output
    assert "restart 1 of 1, from step 3: the ranks that did not fail have kept it" in output
    assert "no restart: 1 of 1 restarts were used in the last 3600 s" in output


def test_the_same_exception_at_the_same_step_causes_no_third_attempt(tmp_path: Path) -> None:
    output = _fit(tmp_path, "--model.fault", "raise", "--model.times", "9", "--max-restarts", "5").check(1).output
    assert output.count("failed first") == 2
    assert "no restart: the previous attempt failed in the same way (ValueError" in output


def test_an_import_error_in_a_step_causes_no_restart(tmp_path: Path) -> None:
    output = _fit(tmp_path, "--model.fault", "import", "--max-restarts", "5").check(1).output
    assert output.count("failed first: ModuleNotFoundError: No module named 'nowhere' at step 3") == 1
    assert "no restart: this error would repeat" in output


def test_an_error_on_every_rank_is_reported_once_without_a_restart(tmp_path: Path) -> None:
    output = _fit(tmp_path, "--model", "nowhere.Model", "--max-restarts", "5").check(2).output
    assert output.startswith("error: the config has 1 problem:\n  model.class_path: nowhere.Model does not import")
    assert "failed first" not in output
    assert "Traceback" not in output
