"""Partitions from `sinfo`, and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm.partitions import Partition, PartitionsError, parse_partitions, read_partitions

_SINFO = """\
cpu|up|1-00:00:00|12|64|256000|(null)
gpu*|up|infinite|4|128|1031000|gpu:h100:8(S:0-1),nvme:1
gpu*|up|infinite|2|96|515000|gpu:h100:4
old|down|2:00:00|3|16+|64000+|gpu:2
mixed|up|30:00|1|8|32000|gpu:a100:2,gpu:v100:1(S:0)
"""


def fake_sinfo(folder: Path, script: str) -> None:
    program = folder / "sinfo"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_partitions_are_read_with_the_default_first() -> None:
    assert parse_partitions(_SINFO) == (
        Partition("gpu", True, True, "infinite", 6, 96, 515000, 4, "h100"),
        Partition("cpu", False, True, "1-00:00:00", 12, 64, 256000, 0),
        Partition("old", False, False, "2:00:00", 3, 16, 64000, 2),
        Partition("mixed", False, True, "30:00", 1, 8, 32000, 3),
    )


@pytest.mark.parametrize(
    ("gres", "gpus", "kind"),
    [
        ("(null)", 0, None),
        ("gpu", 1, None),
        ("gpu:4", 4, None),
        ("gpu:a100", 1, "a100"),
        ("gres/gpu:a100_3g.20gb:7", 7, "a100_3g.20gb"),
        ("shard:8,gpu:l4:2(S:0)", 2, "l4"),
        ("vgpu:2,craynetwork:4", 0, None),
    ],
)
def test_gpus_of_a_node(gres: str, gpus: int, kind: str | None) -> None:
    (partition,) = parse_partitions(f"p|up|1:00|1|2|3|{gres}\n")
    assert (partition.gpus_per_node, partition.gpu_type) == (gpus, kind)


@pytest.mark.parametrize("text", ["", "\n", "slurm_load_partitions: error\n", "|up|1|1|1|1|\n"])
def test_other_lines_are_skipped(text: str) -> None:
    assert parse_partitions(text) == ()


def test_sinfo_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sinfo(
        tmp_path, 'test "$*" = "--noheader --format=%P|%a|%l|%D|%c|%m|%G" && echo "gpu*|up|1:00|2|8|64000|gpu:4"'
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (partition,) = read_partitions()
    assert (partition.name, partition.nodes, partition.gpus_per_node) == ("gpu", 2, 4)


def test_a_machine_without_slurm_has_no_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_partitions() == ()


def test_the_error_has_the_message_of_sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sinfo(tmp_path, "echo 'Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(PartitionsError, match="exit code 1: Unable to contact slurm controller"):
        read_partitions()


def test_without_a_reachable_cluster_the_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        "sinfo: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host",
        "sinfo: error: fetch_config: DNS SRV lookup failed",
        "sinfo: error: _establish_config_source: failed to fetch config",
        "sinfo: fatal: Could not establish a configuration source",
        "",
    )
    fake_sinfo(tmp_path, "\n".join(f"echo '{line}' >&2" for line in lines) + "\nexit 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(PartitionsError) as raised:
        read_partitions()
    assert str(raised.value) == "sinfo failed with exit code 1: Could not establish a configuration source"


def test_a_sinfo_that_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sinfo(tmp_path, "exec sleep 60")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("slurm.partitions._TIMEOUT_S", 0.2)
    with pytest.raises(PartitionsError, match=r"did not answer within 0\.2 seconds"):
        read_partitions()
