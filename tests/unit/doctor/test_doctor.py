"""`launcher doctor`: the limits of its checks, and what it reports."""

from __future__ import annotations

import http.server
import json
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launcher.cli import main as cli
from launcher.doctor import checks as doctor_checks
from launcher.doctor.finding import Check, Finding, run_checks
from launcher.doctor.gpus import GpuFacts
from slurm.version import SlurmFacts, parse_version, read_slurm
from tests.support.processes import launcher, run
from tests.unit.slurm.test_partitions import fake_sinfo


def check_good() -> Iterator[Finding]:
    yield Finding("one", "ok", "well")


def check_doubtful() -> Iterator[Finding]:
    yield Finding("two", "warning", "perhaps", "look at it")


def check_broken_thing() -> Iterator[Finding]:
    yield Finding("three", "ok", "half of it")
    raise ImportError("libcudart.so: no such file")


def test_a_check_that_raises_is_a_failure_and_the_others_run() -> None:
    findings = run_checks([check_broken_thing, check_good])
    assert [(f.name, f.status) for f in findings] == [("three", "ok"), ("broken thing", "failure"), ("one", "ok")]
    assert findings[1].found == "ImportError: libcudart.so: no such file"


@pytest.mark.parametrize(
    ("checks", "code"), [((check_good, check_doubtful), 0), ((check_good, check_broken_thing, check_doubtful), 1)]
)
def test_only_a_failure_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checks: tuple[Check, ...], code: int
) -> None:
    monkeypatch.setattr(doctor_checks, "CHECKS", checks)
    assert cli.run(["doctor"]) == code
    output = capsys.readouterr().out
    assert "look at it" in output
    assert f"1 warning, {code} failure" in output
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
def test_versions_are_compared_with_the_known_ones(text: str, status: str, found: str) -> None:
    finding = doctor_checks.version_finding(Requirement(text))
    assert finding.status == status
    assert found in finding.found
    assert finding.advice == ("" if status == "ok" else f"pip install '{text}'")


def test_every_library_of_the_launcher_is_checked() -> None:
    names = {finding.name for finding in doctor_checks.check_versions()}
    assert {"python", "torch", "lightning", "deepspeed", "wandb", "submitit"} <= names
    assert not names & {"pytest", "ruff"}, "extras are not needed"


def test_a_package_that_overwrites_the_command_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert run_checks([doctor_checks.check_command]) == ()
    stranger = tmp_path / "launcher-0.1.dist-info"
    stranger.mkdir()
    (stranger / "METADATA").write_text("Metadata-Version: 2.1\nName: launcher\nVersion: 0.1\n")
    (finding,) = run_checks([doctor_checks.check_command])
    assert finding.status == "warning"
    assert "'launcher' 0.1 is installed too" in finding.found
    assert finding.advice.startswith("pip uninstall launcher, then reinstall training-launcher")


def test_a_copy_that_was_never_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "DISTRIBUTION", "no-such-package-anywhere")
    python, finding = doctor_checks.check_versions()
    assert (python.name, finding.name, finding.status) == ("python", "no-such-package-anywhere", "warning")
    assert finding.advice.startswith("pip install -e /")


def test_free_space_is_compared_with_the_needed_space(tmp_path: Path) -> None:
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
        (1024, 2048, "warning", "ask the administrator for a hard limit of 4096 (limits.conf); it is 2048"),
    ],
)
def test_open_files(soft: int, hard: int, status: str, advice: str) -> None:
    finding = doctor_checks.open_files_finding(soft, hard)
    assert (finding.status, finding.advice) == (status, advice)


def test_a_missing_compiler_is_reported_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(iter(doctor_checks.check_compiler())).status == "ok"
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler, ninja = doctor_checks.check_compiler()
    assert (compiler.status, compiler.advice) == (
        "warning",
        "DeepSpeed needs it to build its CPU Adam: apt-get install g++",
    )
    assert ninja.status == "ok", "pip installs ninja next to Python"


def test_fsdp2_needs_its_classes_and_a_backend_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = doctor_checks.check_fsdp()
    assert (finding.name, finding.status) == ("FSDP2", "ok")
    assert re.match(r"fully_shard and DTensor of torch 2\.\d+.*, over (nccl and )?gloo$", finding.found)
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        patch.setattr("torch.distributed.is_nccl_available", lambda: False)
        (finding,) = doctor_checks.check_fsdp()
    assert (finding.status, finding.advice) == ("failure", "install a build of torch with nccl")
    assert finding.found.endswith(", over gloo")
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", None)
    (finding,) = doctor_checks.check_fsdp()
    assert (finding.status, finding.advice[:24]) == ("failure", "pip install 'torch>=2.10")


@pytest.mark.parametrize("answer", [200, 404, 500])
def test_a_server_that_answers_with_any_status_is_reached(answer: int) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
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


def test_wandb_without_a_key_is_a_warning_and_disabled_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = doctor_checks.check_wandb()
    assert finding.status == "warning"
    assert "wandb login" in finding.found
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert [f.status for f in doctor_checks.check_wandb()] == ["ok"]


@pytest.mark.parametrize(
    ("script", "statuses"),
    [
        ("echo 'gpu*|up|1:00|2|8|64000|gpu:4'; echo 'old|down|1:00|2|8|64000|(null)'",
         ["SLURM ok", "accounting ok", "SLURM ok", "SLURM warning"]),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", ["SLURM failure"]),
        ("exit 0", ["SLURM ok", "accounting ok", "SLURM warning"]),
    ],
)  # fmt: skip
def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, statuses: list[str]) -> None:
    fake_sinfo(tmp_path, f'[ "$1" = --version ] && echo "slurm-wlm 22.05.8" && exit 0\n{script}')
    (tmp_path / "sacct").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert [f"{finding.name} {finding.status}" for finding in doctor_checks.check_slurm()] == statuses


def test_without_slurm_there_is_nothing_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [(f.status, f.found) for f in doctor_checks.check_slurm()] == [
        ("ok", "no sinfo: this is not a login node of a cluster")
    ]


@pytest.mark.parametrize(
    ("version", "accounting", "statuses"),
    [
        ((22, 5, 8), "", ["ok", "ok"]),
        ((20, 11, 9), "", ["warning", "ok"]),
        ((18, 8, 7), "", ["failure", "ok"]),
        ((), "Slurm accounting storage is disabled", ["ok", "warning"]),
    ],
)
def test_slurm_version_and_accounting(version: tuple[int, ...], accounting: str, statuses: list[str]) -> None:
    findings = list(doctor_checks.slurm_findings(SlurmFacts(version, accounting)))
    assert [f.status for f in findings] == statuses
    assert all(bool(f.advice) == (f.status != "ok") for f in findings)


def test_accounting_that_is_missing_fails_or_hangs_is_reported() -> None:
    def answer(sacct: BaseException | subprocess.CompletedProcess[str]) -> SlurmFacts:
        def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
            if command[0] == "sinfo":
                return subprocess.CompletedProcess(command, 0, "slurm 23.11.4\n", "")
            if isinstance(sacct, BaseException):
                raise sacct
            return sacct

        return read_slurm(run)

    assert answer(subprocess.CompletedProcess([], 0, "", "")) == SlurmFacts((23, 11, 4), "")
    assert answer(FileNotFoundError()).accounting == "sacct is not installed"
    assert answer(subprocess.TimeoutExpired("sacct", 10)).accounting == "sacct did not answer within 10 s"
    assert answer(PermissionError("no")).accounting == "sacct could not be run: no"
    disabled = subprocess.CompletedProcess([], 1, "", "Slurm accounting storage is disabled\n")
    assert answer(disabled).accounting == "Slurm accounting storage is disabled"
    assert answer(subprocess.CompletedProcess([], 2, "", "")).accounting == "sacct ended with exit code 2"
    assert parse_version("nothing") == ()


@pytest.mark.parametrize(
    ("limit", "infiniband", "status"),
    [(resource.RLIM_INFINITY, True, "ok"), (8 * 2**20, True, "failure"), (8 * 2**20, False, "ok")],
)
def test_infiniband_needs_locked_memory(limit: int, infiniband: bool, status: str) -> None:
    assert doctor_checks.locked_memory_finding(limit, has_infiniband=infiniband).status == status


@pytest.mark.parametrize(
    ("soft", "hard", "advice"),
    [
        (96365, 96365, ""),
        (1024, 96365, "ulimit -u 4096"),
        (512, 1024, "ask the administrator for a hard limit of 4096 (limits.conf)"),
    ],
)
def test_processes(soft: int, hard: int, advice: str) -> None:
    finding = doctor_checks.processes_finding(soft, hard)
    assert finding.advice.startswith(advice)
    assert (finding.status == "ok") == (not advice)


def test_a_machine_with_a_driver_is_checked_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = GpuFacts("470.223.02", (11, 4), "2.10.0+cu128", "12.8")
    monkeypatch.setattr(doctor_checks, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(doctor_checks, "probe_gpus", lambda timeout: facts)
    cuda, device = doctor_checks.check_devices()
    assert (cuda.name, cuda.status) == ("CUDA", "failure")
    assert (device.name, device.status) == ("device", "warning")


def test_a_check_that_hangs_is_a_failure_and_the_others_run() -> None:
    held = threading.Event()

    def check_slow_disk() -> Iterator[Finding]:
        yield Finding("one", "ok", "half of it")
        held.wait(60)

    findings = run_checks([check_slow_disk, check_good], timeout=0.2)
    held.set()
    assert [(f.name, f.status) for f in findings][-2:] == [("slow disk", "failure"), ("one", "ok")]
    assert findings[-2].found == "no answer within 0.2 s"


@pytest.mark.slow
def test_all_checks_on_this_machine(tmp_path: Path) -> None:
    ended = run(launcher("doctor", "--json"), tmp_path, timeout=120)
    findings = json.loads(ended.output)
    assert {f["status"] for f in findings} <= {"ok", "warning", "failure"}
    assert all(f["advice"] for f in findings if f["status"] != "ok")
    assert {"python", "torch", "C++ compiler", "FSDP2", "disk", "open files", "hostname", "W&B", "SLURM"} <= {
        f["name"] for f in findings
    }
    ended.check(1 if any(f["status"] == "failure" for f in findings) else 0)
