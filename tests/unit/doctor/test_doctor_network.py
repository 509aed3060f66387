"""Findings about the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.doctor.network import (
    Interface,
    Port,
    check_hostname,
    check_interfaces,
    hostname_finding,
    interface_findings,
    port_findings,
    read_interfaces,
    read_ports,
)

ETH = Interface("eth0", ("10.0.0.3",), 25_000, 9000)
NAMES = ("lo", "eth0", "ib0")


@pytest.mark.parametrize(
    ("addresses", "status", "text"),
    [
        ({"10.0.0.3"}, "ok", "n1 is 10.0.0.3"),
        ({"127.0.1.1"}, "warning", "other nodes need its network address"),
        ({"::1", "127.0.0.1"}, "warning", "other nodes need its network address"),
        ({"::1", "10.0.0.3"}, "ok", "n1 is 10.0.0.3, ::1"),
        ({"10.0.0.9"}, "warning", "which is not an address of this machine (it has 10.0.0.3)"),
        ({"10.0.0.9", "10.0.0.3"}, "ok", ""),
    ],
)
def test_a_hostname_of_loopback_or_another_machine_is_a_warning(addresses: set[str], status: str, text: str) -> None:
    finding = hostname_finding("n1", addresses, {"10.0.0.3"})
    assert finding.status == status
    assert text in finding.found + finding.advice
    assert bool(finding.advice) == (status != "ok")


def test_a_hostname_without_an_address_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "no-such-host.invalid")
    (finding,) = check_hostname()
    assert finding.status == "failure"
    assert "add no-such-host.invalid to /etc/hosts" in finding.advice


def test_interfaces_are_listed_with_their_speed() -> None:
    (finding,) = interface_findings([ETH], NAMES, {})
    assert (finding.status, finding.found) == ("ok", "eth0: 10.0.0.3, 25 Gbit/s, MTU 9000")
    (finding,) = interface_findings([Interface("br0", ("10.0.0.3", "fd00::2"), 0, 0)], NAMES, {})
    assert finding.found == "br0: 10.0.0.3, fd00::2"
    (finding,) = interface_findings([], ["lo"], {})
    assert finding.status == "warning"


@pytest.mark.parametrize(
    ("variable", "value", "status"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", "ok"),  # a prefix
        ("NCCL_SOCKET_IFNAME", "=eth", "failure"),
        ("NCCL_SOCKET_IFNAME", "=eth0", "ok"),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", None),
        ("NCCL_SOCKET_IFNAME", "bond,eth", "ok"),  # one match is enough
        ("NCCL_SOCKET_IFNAME", "bond0", "failure"),
        ("GLOO_SOCKET_IFNAME", "eth", "failure"),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", "ok"),
        ("GLOO_SOCKET_IFNAME", "eth0,ib1", "failure"),
        ("GLOO_SOCKET_IFNAME", "", None),
    ],
)
def test_a_variable_that_names_no_interface_is_a_failure(variable: str, value: str, status: str | None) -> None:
    found = list(interface_findings([ETH], NAMES, {variable: value}))[1:]
    assert [f.status for f in found] == ([] if status is None else [status])
    if status == "failure":
        assert f"{variable}={value}, but there is no such interface" in found[0].found
        assert "eth0, ib0, lo" in found[0].advice


def test_infiniband_ports_that_are_down_are_named() -> None:
    up = Port("mlx5_0/1", "4: ACTIVE", "400 Gb/sec (4X NDR)")
    down = Port("mlx5_1/1", "1: DOWN", "10 Gb/sec (4X SDR)")
    active, down_finding = port_findings([up, down])
    assert (active.status, active.found) == ("ok", "mlx5_0/1: active, 400 Gb/sec (4X NDR)")
    assert (down_finding.status, down_finding.found) == ("warning", "mlx5_1/1 is DOWN")
    assert list(port_findings([])) == []


def test_infiniband_ports_are_read_from_the_kernel(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    assert read_ports(tmp_path) == (Port("mlx5_0/1", "4: ACTIVE", "unknown"),)
    assert read_ports(tmp_path / "none") == ()


def test_the_interfaces_of_this_machine() -> None:
    assert all(one.addresses and one.mtu > 0 and one.megabits >= 0 for one in read_interfaces())
    assert all(finding.name in ("network", "InfiniBand") for finding in check_interfaces())
