"""Several agents, as on several nodes: rendezvous, node numbers, exchanged failures, and a smaller run after a loss."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.processes import Finished, launcher, run_warm
from tests.support.runs import PERSISTENT, TOY, events_of, free_port, read_trace, toy_env

pytestmark = pytest.mark.slow
SETTINGS = (*TOY, "--global_batch_size", "8", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1",
            "--name", "it", "--nproc-per-node", "1", "--rdzv-conf", "join_timeout=120,last_call_timeout=1")  # fmt: skip


# Writes the process id of the agent of node 0 or 1 into a file for the test.
_MARK = """\
import os
from pathlib import Path
from tests.support.toy import Toy


class Mark(Toy):
    def on_fit_start(self):
        Path(f"agent-{self.global_rank}").write_text(str(os.getsid(0)))
"""


def _fit_on_nodes(
    cwd: Path, nodes: str, own: Sequence[Sequence[str]], on_line: Callable[[int, str, int], None] | None = None
) -> list[Finished]:
    """Start one agent for each entry of `own`; `on_line` receives all lines with the node's number."""
    endpoint = f"127.0.0.1:{free_port()}"

    def one(node: int) -> Finished:
        def forward(line: str, agent: int) -> None:
            if on_line is not None:
                on_line(node, line, agent)

        arguments = ("--nnodes", nodes, "--node-rank", str(node), "--rdzv-endpoint", endpoint, *own[node])
        command = launcher("fit", *SETTINGS, *arguments)
        return run_warm(command, cwd, env=toy_env(cwd / "trace"), timeout=200, on_line=forward)

    with ThreadPoolExecutor(len(own)) as pool:
        return list(pool.map(one, range(len(own))))


def test_two_nodes_keep_their_numbers_and_train_together(tmp_path: Path) -> None:
    zero, one = _fit_on_nodes(tmp_path, "2", [(), ()])

    assert (zero.code, one.code) == (0, 0), zero.output + one.output
    assert "2 x " in zero.output
    assert "on 2 nodes" in zero.output
    assert "continue    on each of the 2 nodes:\n" in zero.output
    assert re.search(r" --resume auto --nnodes 2 --rdzv-endpoint \S+:29400 --nproc-per-node 1 ", zero.output)
    assert "Plan" not in one.output
    assert len(read_trace(tmp_path / "trace", 0)) == len(read_trace(tmp_path / "trace", 1)) == 16


def test_a_failure_on_one_node_is_reported_on_both_and_both_restart(tmp_path: Path) -> None:
    arguments = ("--model", "tests.support.faulty.Faulty", "--model.fault", "kill", "--max-restarts", "2",
                 "--checkpoint.every_n_steps", "2", *PERSISTENT)  # fmt: skip
    zero, one = _fit_on_nodes(tmp_path, "2", [arguments, arguments])

    assert (zero.code, one.code) == (0, 0), zero.output + one.output
    for output in (zero.output, one.output):
        assert re.search(r"error: rank 1 \(\S+\) failed first: killed by SIGKILL \(signal 9\) at step 3", output), (
            output
        )
    assert events_of(tmp_path / "runs" / "it", "finished")[0]["step"] == 16


def test_after_a_lost_node_a_smaller_run_keeps_the_global_batch(tmp_path: Path) -> None:
    lost: list[int] = []

    def lose_node_one(node: int, line: str, agent: int) -> None:
        # Kill it at a step of rank zero.
        if line.startswith("step 4/") and not lost:
            lost.append(int((tmp_path / "agent-1").read_text()))
            os.kill(lost[0], signal.SIGKILL)

    (tmp_path / "mark.py").write_text(_MARK)
    arguments = ("--model", "mark.Mark", "--max-restarts", "2", "--checkpoint.every_n_steps", "1",
                 "--trainer.max_epochs", "10",
                 # One node is enough, so the first must wait for the second one's slow start.
                 "--rdzv-conf", "join_timeout=120,last_call_timeout=5")  # fmt: skip
    zero, one = _fit_on_nodes(tmp_path, "1:2", [arguments, arguments], lose_node_one)

    assert one.code == -signal.SIGKILL
    zero.check()
    directory = tmp_path / "runs" / "it"
    first, second = (event["plan"] for event in events_of(directory, "planned"))
    assert (first["world_size"], second["world_size"]) == (2, 1)
    assert first["batch"]["global_batch_size"] == second["batch"]["global_batch_size"] == 8
    assert events_of(directory, "finished")[0]["step"] == 80


def test_a_missing_node_is_reported_and_written_into_the_resumed_run(tmp_path: Path) -> None:
    (run,) = _fit_on_nodes(tmp_path, "2", [("--trainer.max_steps", "1", "--rdzv-conf", "join_timeout=1")])
    run.check(2)
    assert "node 1 did not join within 1 s" in run.output
    assert not (tmp_path / "runs").exists(), "a run that did not start leaves no files"
    (tmp_path / "runs" / "it").mkdir(parents=True)
    for more in ((), ("--resume", "auto")):
        arguments = ("--trainer.max_steps", "1", "--rdzv-conf", "join_timeout=1", *more)
        _fit_on_nodes(tmp_path, "2", [arguments])[0].check(2)
    # Without --resume the existing directory belongs to another run.
    assert [event["nodes"] for event in events_of(tmp_path / "runs" / "it", "nodes_missing")] == [[1]]


def test_the_loss_of_the_node_that_serves_the_rendezvous_ends_the_run_and_is_reported(tmp_path: Path) -> None:
    lost: list[int] = []

    def lose_node_zero(node: int, line: str, agent: int) -> None:
        if line.startswith("step 4/") and not lost:
            lost.append(int((tmp_path / "agent-0").read_text()))
            os.kill(lost[0], signal.SIGKILL)

    (tmp_path / "mark.py").write_text(_MARK)
    arguments = ("--model", "mark.Mark", "--max-restarts", "2", "--trainer.max_epochs", "400")
    zero, one = _fit_on_nodes(tmp_path, "2", [arguments, arguments], lose_node_zero)

    assert zero.code == -signal.SIGKILL
    one.check(1)
    assert one.output.count("the node that serves the rendezvous at 127.0.0.1:") == 1, one.output
    assert "\nTraceback" not in one.output, "only the log of a rank is quoted"


def test_a_hang_is_reported_on_the_waiting_node_and_on_the_sleeping_one(tmp_path: Path) -> None:
    arguments = ("--model", "tests.support.faulty.Faulty", "--model.fault", "sleep", "--hang-timeout", "10")
    zero, one = _fit_on_nodes(tmp_path, "2", [arguments, arguments])

    hung = r"hung at step 3: it was in .*; it did not enter all_reduce of .*, in which rank 0 waits"
    expected = rf"error: rank 1 \(\S+\) failed first: {hung}"
    for finished in (zero, one):
        finished.check(1)
        assert re.search(expected, finished.output), finished.output
    assert {tuple(event["waiting_for"]) for event in events_of(tmp_path / "runs" / "it", "hang")} == {(1,)}
