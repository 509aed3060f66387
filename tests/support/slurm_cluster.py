"""A real SLURM of two nodes on this machine, private to the test run: network namespaces, munge, accounting, GRES.

The machine's own configuration is neither read nor written. Each node has its own network, host name and /etc/hosts.
All processes are started here and ended by process id.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db", "sbatch", "srun", "sacct",
            "sacctmgr", "scontrol", "ip", "nsenter", "unshare")  # fmt: skip
NODES = ("n1", "n2")
_CPUS = 4
# Seconds; a busy machine may take as long for a one-second task.
_PATIENCE = 90.0


def missing_parts() -> list[str]:
    """Components that this machine lacks."""
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0:
        lacking.append("root, for network namespaces")
    return lacking


def wait_until(what: str, done: Callable[[], object], patience: float = _PATIENCE) -> None:
    """Wait until a condition is true.

    Raises:
        TimeoutError: it stayed false for too long.
    """
    give_up = time.monotonic() + patience
    while not done():
        if time.monotonic() > give_up:
            raise TimeoutError(f"not within {patience:g} s: {what}")
        time.sleep(0.1)


class Cluster:
    """Two nodes `n1` and `n2`, partitions `low` (preempted with 30 s of grace) and `high`.

    Args:
        folder: for all files of the daemons.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._daemons: dict[str, tuple[list[str], dict[str, str]]] = {}
        # Unique names, of at most 15 letters.
        self._tag = f"{os.getpid() % 100_000}{secrets.token_hex(1)}"
        self._bridge = f"lb{self._tag}"
        self._subnet = _free_subnet()
        self._ports = _free_ports(3)

    def start(self) -> None:
        """Start everything; after an error end what was started."""
        try:
            self._make_network()
            self._write_configuration()
            self._start_munge()
            self._start_accounting()
            self.start_daemon("slurmctld")
            for node in NODES:
                self.start_daemon(node)
            wait_until("both nodes idle", lambda: self.node_states() == {"idle"})
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all started processes in reverse order and remove the network."""
        with contextlib.suppress(Exception):
            self.command("scancel", "--full", "--state=RUNNING")
        for name, process in reversed(self._processes):
            _end(name, process)
        self._kill_job_processes()
        for node in NODES:
            _ip("netns", "delete", self.namespace(node), check=False)
        _ip("link", "delete", self._bridge, check=False)

    def namespace(self, node: str) -> str:
        """Name of a node's network namespace."""
        return f"{self._bridge}-{node}"

    def veth(self, node: str) -> str:
        """This machine's end of a node's virtual cable."""
        return f"v{self._tag}{node}"

    def address(self, node: str) -> str:
        """A node's address."""
        return f"{self._subnet}.{10 + NODES.index(node) + 1}"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables for SLURM's commands."""
        return {"SLURM_CONF": str(self.conf)}

    def command(self, *arguments: str) -> str:
        """Run one of SLURM's commands and return its output."""
        done = subprocess.run(arguments, env={**os.environ, **self.env}, capture_output=True, text=True,
                              timeout=_PATIENCE, check=False)  # fmt: skip
        assert done.returncode == 0, (
            f"{' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.log_tails()}"
        )
        return done.stdout.strip()

    def node_states(self) -> set[str]:
        """The nodes' states, without marks such as `*`."""
        try:
            listed = self.command("sinfo", "--noheader", "--Node", "--format=%t")
        except AssertionError:
            return set()
        return set(listed.split())

    def node_state(self, node: str) -> str:
        """One node's state, with its marks."""
        return self.command("sinfo", "--noheader", "--Node", f"--nodes={node}", "--partition=low", "--format=%t")

    def job_field(self, job_id: str, field: str) -> str:
        """One field of `scontrol show job`."""
        text = self.command("scontrol", "--oneliner", "show", "job", job_id)
        found = [part.partition("=")[2] for part in text.split() if part.startswith(f"{field}=")]
        return found[0] if found else ""

    def start_daemon(self, name: str) -> None:
        """Start slurmctld or a node's slurmd (again)."""
        arguments, env = self._daemons[name]
        log = (self.folder / f"{name}.out").open("ab")
        with log:
            process = subprocess.Popen(
                arguments, env={**os.environ, **env}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self._processes.append((name, process))

    def kill_daemon(self, name: str) -> None:
        """SIGKILL to slurmctld or a node's slurmd."""
        for known, process in self._processes:
            if known == name and process.poll() is None:
                process.kill()
                process.wait()

    def unplug(self, node: str) -> None:
        """Disconnect a node from the network."""
        _ip("link", "set", self.veth(node), "down")

    def plug_in(self, node: str) -> None:
        """Connect the node again."""
        _ip("link", "set", self.veth(node), "up")

    def log_tails(self) -> str:
        """The last lines of every daemon."""
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"== {f.name}\n{_tail(f)}" for f in files)

    def hold_tasks(self, node: str) -> None:
        """Hold all new tasks on a node."""
        self._held(node).touch()

    def let_tasks_begin(self, node: str) -> None:
        """Release new and held tasks."""
        self._held(node).unlink(missing_ok=True)

    def _held(self, node: str) -> Path:
        return self.folder / f"held-{node}"

    def _make_network(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self._subnet}.1/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for node in NODES:
            space, veth, inner = self.namespace(node), self.veth(node), f"w{self._tag}{node}"
            _ip("netns", "add", space)
            _ip("link", "add", veth, "type", "veth", "peer", "name", inner)
            _ip("link", "set", veth, "master", self._bridge)
            _ip("link", "set", veth, "up")
            _ip("link", "set", inner, "netns", space)
            _ip("-n", space, "link", "set", inner, "name", "eth0")
            _ip("-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def _write_configuration(self) -> None:
        folder, host = self.folder, socket.gethostname()
        for name in ("state", "spool-n1", "spool-n2", "db", "munge"):
            (folder / name).mkdir(mode=0o711)
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        (folder / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n" + "".join(
            f"{self.address(node)} {node}\n" for node in NODES) + f"{self._subnet}.1 {host}\n")  # fmt: skip
        controller, node_port, accounting = self._ports
        socket_file = folder / "munge" / "socket"
        each = f"Port={node_port} CPUs={_CPUS} RealMemory=8000 Gres=gpu:2 State=UNKNOWN"
        nodes = "\n".join(f"NodeName={node} NodeAddr={self.address(node)} {each}" for node in NODES)
        self.conf.write_text(f"""\
ClusterName=test{self._tag}
SlurmctldHost={host}({self._subnet}.1)
SlurmctldPort={controller}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={socket_file},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/prolog
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2
ReturnToService=2
MpiDefault=none
GresTypes=gpu
SlurmdTimeout=15
InactiveLimit=0
KillWait=30
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={socket_file}
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=off MaxTime=INFINITE State=UP
""")
        prolog = folder / "prolog"
        prolog.write_text(f'#!/bin/sh\nwhile [ -e "{folder}/held-$SLURMD_NODENAME" ]; do sleep 0.2; done\n')
        prolog.chmod(0o755)
        (folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null,/dev/zero\n")
        self._daemons["slurmctld"] = (["slurmctld", "-D", "-f", str(self.conf)], self.env)
        for node in NODES:
            # The nodes reach no name server, and each lookup would wait for seconds.
            mounts = " && ".join(f'mount --bind "{folder}/{name}" /etc/{name}' for name in ("hosts", "resolv.conf"))
            prepare = f"{mounts} && hostname {node}"
            script = f'{prepare} && exec slurmd -D -f "{self.conf}" -N {node}'
            enter = ["nsenter", f"--net=/run/netns/{self.namespace(node)}", "unshare", "--uts", "--mount"]
            self._daemons[node] = ([*enter, "bash", "-c", script], self.env)

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        key = munge / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        # Allows clients with other user ids; here all are root.
        arguments = ["munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={key}",
                     f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"]  # fmt: skip
        self._daemons["munged"] = (arguments, {})
        self.start_daemon("munged")
        wait_until("munge's socket", (munge / "socket").exists)

    def _start_accounting(self) -> None:
        folder, database = self.folder, self.folder / "db"
        sock, password = database / "socket", secrets.token_hex(12)
        subprocess.run(["mariadb-install-db", "--no-defaults", f"--datadir={database}/data", "--user=root",
                        "--auth-root-authentication-method=socket", "--skip-test-db"],
                       check=True, capture_output=True, timeout=4 * _PATIENCE)  # fmt: skip
        (port,) = _free_ports(1)
        start = database / "start.sql"
        # One statement on each line.
        start.write_text(
            "CREATE DATABASE slurm_acct_db;\n"
            f"CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';\n"
            "GRANT ALL PRIVILEGES ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';\n"
        )
        arguments = ["mariadbd", "--no-defaults", "--user=root", f"--datadir={database}/data", f"--socket={sock}",
                     f"--port={port}", "--bind-address=127.0.0.1", f"--pid-file={database}/pid", f"--init-file={start}",
                     "--innodb-flush-log-at-trx-commit=0", "--skip-name-resolve"]  # fmt: skip
        self._daemons["mariadbd"] = (arguments, {})
        self.start_daemon("mariadbd")
        wait_until("the database", lambda: _listens(port))
        conf = folder / "slurmdbd.conf"
        conf.write_text(f"""\
DbdHost=localhost
DbdPort={self._ports[2]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
""")
        conf.chmod(0o600)
        self._daemons["slurmdbd"] = (["slurmdbd", "-D"], self.env)
        self.start_daemon("slurmdbd")
        wait_until("the accounting", lambda: _listens(self._ports[2]))
        self.command("sacctmgr", "--immediate", "add", "cluster", f"test{self._tag}")

    def _kill_job_processes(self) -> None:
        """Processes that a killed slurmd left on a node."""
        for node in NODES:
            listed = _ip("netns", "pids", self.namespace(node), check=False)
            for pid in listed.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=30)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _end(name: str, process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(15 if name == "mariadbd" else 5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_subnet() -> str:
    """The first three numbers of a /24 that no interface of this machine is in."""
    used = _ip("-4", "-o", "addr", "show")
    return next(net for _ in range(100) if f" {(net := f'10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}')}."
                not in used)  # fmt: skip


def _free_ports(count: int) -> list[int]:
    """Different ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _tail(file: Path, lines: int = 15) -> str:
    try:
        return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return str(error)
