"""`launcher doctor`: what counts as sound, and what is said where it is not."""

from __future__ import annotations

import http.server
import json
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launcher import cli, doctor, doctor_checks
from launcher.doctor import Finding, examine
from tests.processes import launcher, run
from tests.unit.test_partitions import fake_sinfo


def check_sound() -> Iterator[Finding]:
    yield Finding("one", "ok", "well")


def check_doubtful() -> Iterator[Finding]:
    yield Finding("two", "warning", "perhaps", "look at it")


def check_broken_thing() -> Iterator[Finding]:
    yield Finding("three", "ok", "half of it")
    raise ImportError("libcudart.so: no such file")


def test_a_check_that_raises_is_a_failure_and_stops_no_other() -> None:
    findings = examine([check_broken_thing, check_sound])
    assert [(f.name, f.status) for f in findings] == [("three", "ok"), ("broken thing", "failure"), ("one", "ok")]
    assert findings[1].found == "ImportError: libcudart.so: no such file"


@pytest.mark.parametrize(
    ("checks", "code"), [((check_sound, check_doubtful), 0), ((check_sound, check_broken_thing, check_doubtful), 1)]
)
def test_only_a_failure_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checks: tuple[doctor.Check, ...], code: int
) -> None:
    monkeypatch.setattr(doctor_checks, "CHECKS", checks)
    assert cli.run(["doctor"]) == code
    said = capsys.readouterr().out
    assert "look at it" in said
    assert f"1 warning, {code} failure" in said
    assert cli.run(["doctor", "--json"]) == code
    parsed = json.loads(capsys.readouterr().out)
    assert parsed[0] == {"name": "one", "status": "ok", "found": "well", "advice": ""}


@pytest.mark.parametrize(
    ("text", "status", "found"),
    [
        ("pyyaml>=5", "ok", ""),
        ("pyyaml>=99", "failure", "known to work: >=99"),
        ("pyyaml<2", "failure", "known to work: <2"),
        ("no-such-package-anywhere>=1", "failure", "not installed"),
    ],
)
def test_versions_are_held_against_the_known_ones(text: str, status: str, found: str) -> None:
    finding = doctor_checks.version_finding(Requirement(text))
    assert finding.status == status
    assert found in finding.found
    assert finding.advice == ("" if status == "ok" else f"pip install '{text}'")


def test_every_library_of_the_launcher_is_looked_at() -> None:
    names = {finding.name for finding in doctor_checks.check_versions()}
    assert {"python", "torch", "lightning", "deepspeed", "wandb", "submitit"} <= names
    assert not names & {"pytest", "ruff"}, "extras are no need"


def test_free_space_is_held_against_what_is_needed(tmp_path: Path) -> None:
    assert doctor_checks.space_finding("disk", str(tmp_path), 0, "more").status == "ok"
    short = doctor_checks.space_finding("disk", str(tmp_path), 1 << 62, "more")
    assert (short.status, short.advice) == ("warning", "more")
    assert doctor_checks.space_finding("disk", str(tmp_path / "none"), 0, "more").status == "warning"


@pytest.mark.parametrize(
    ("soft", "hard", "status", "advice"),
    [
        (4096, 4096, "ok", ""),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, "ok", ""),
        (1024, 1 << 20, "warning", "ulimit -n 4096"),
        (1024, resource.RLIM_INFINITY, "warning", "ulimit -n 4096"),
        (1024, 2048, "warning", "ask for a hard limit of 4096 (limits.conf); it is 2048"),
    ],
)
def test_open_files(soft: int, hard: int, status: str, advice: str) -> None:
    finding = doctor_checks.open_files_finding(soft, hard)
    assert (finding.status, finding.advice) == (status, advice)


@pytest.mark.parametrize(
    ("addresses", "status"),
    [({"10.0.0.3"}, "ok"), ({"127.0.1.1"}, "warning"), ({"::1", "127.0.0.1"}, "warning"), ({"::1", "10.0.0.3"}, "ok")],
)
def test_a_hostname_that_only_this_machine_knows_is_doubtful(addresses: set[str], status: str) -> None:
    assert doctor_checks.hostname_finding("n1", addresses).status == status


def test_a_hostname_without_an_address_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "no-such-host.invalid")
    (finding,) = doctor_checks.check_hostname()
    assert finding.status == "failure"
    assert "add no-such-host.invalid to /etc/hosts" in finding.advice


def test_a_missing_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(iter(doctor_checks.check_compiler())).status == "ok"
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler, ninja = doctor_checks.check_compiler()
    assert (compiler.status, compiler.advice) == (
        "warning",
        "DeepSpeed builds its CPU Adam with it: apt-get install g++",
    )
    assert ninja.status == "ok", "pip's ninja lies beside Python"


@pytest.mark.parametrize("answer", [200, 404, 500])
def test_a_server_that_answers_anything_is_reached(answer: int) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            finding = doctor_checks.reach_finding(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert finding.status == "ok"
    refused = doctor_checks.reach_finding(f"http://127.0.0.1:{server.server_port}")
    assert refused.status == "warning"
    assert "does not answer" in refused.found
    assert doctor_checks.reach_finding("file:///etc/passwd").status == "failure"


def test_wandb_without_a_key_is_a_warning_and_switched_off_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = doctor_checks.check_wandb()
    assert finding.status == "warning"
    assert "wandb login" in finding.found
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert [f.status for f in doctor_checks.check_wandb()] == ["ok"]


@pytest.mark.parametrize(
    ("script", "statuses"),
    [
        ("echo 'gpu*|up|1:00|2|8|64000|gpu:4'; echo 'old|down|1:00|2|8|64000|(null)'", ["ok", "warning"]),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", ["failure"]),
        ("exit 0", ["ok"]),
    ],
)
def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, statuses: list[str]) -> None:
    fake_sinfo(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert [finding.status for finding in doctor_checks.check_slurm()] == statuses


@pytest.mark.slow
def test_the_whole_on_this_machine(tmp_path: Path) -> None:
    ended = run(launcher("doctor", "--json"), tmp_path, timeout=120)
    findings = json.loads(ended.output)
    assert {f["status"] for f in findings} <= {"ok", "warning", "failure"}
    assert all(f["advice"] for f in findings if f["status"] != "ok")
    assert {"python", "torch", "C++ compiler", "disk", "open files", "hostname", "W&B", "SLURM"} <= {
        f["name"] for f in findings
    }
    ended.check(1 if any(f["status"] == "failure" for f in findings) else 0)
