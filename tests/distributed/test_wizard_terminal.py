"""The wizard on a real terminal, up to a config that `launcher fit` trains."""

from __future__ import annotations

import os
import pty
import termios
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from pexpect.fdpexpect import fdspawn

from launcher.config.loading import load_config
from tests.support import warm
from tests.support.processes import launcher, run_warm
from tests.support.runs import REPOSITORY, events_of, only_run
from tests.unit.slurm.test_partitions import fake_sinfo

pytestmark = pytest.mark.slow

DOWN, CTRL_C, CTRL_D = "\x1b[B", "\x03", "\x04"
_TIMEOUT_S = 120


class Terminal:
    """`launcher init` in a pseudo-terminal."""

    def __init__(self, folder: Path, *arguments: str, term: str = "xterm", columns: int = 200) -> None:
        # On a machine with SLURM the wizard would ask one more question.
        programs = folder.parent / f"{folder.name}-programs"
        programs.mkdir(exist_ok=True)
        fake_sinfo(programs, "exit 0")
        path = f"{programs}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "TERM": term, "PYTHONPATH": str(REPOSITORY), "PROMPT_TOOLKIT_NO_CPR": "1"}
        master, slave = pty.openpty()
        try:
            termios.tcsetwinsize(slave, (50, columns))
            arguments = ("-m", "launcher", "init", *arguments)
            self.process = warm.start(arguments, folder, env, slave, terminal=True)
        finally:
            os.close(slave)
        self.child = fdspawn(master, encoding="utf-8", timeout=_TIMEOUT_S)

    def answer(self, question: str, keys: str = "") -> None:
        """Wait for a question, then press the keys and Enter."""
        self.child.expect_exact(question)
        self.child.send(keys + "\r")

    def press(self, question: str, keys: str) -> None:
        self.child.expect_exact(question)
        self.child.send(keys)

    def cancel(self, question: str) -> None:
        """Press Ctrl-C at a question. Python loses one that arrives just before it starts to read a line."""
        self.press(question, CTRL_C)
        while self.child.expect_exact(["nothing was written", pexpect.TIMEOUT], timeout=10) == 1:
            self.child.send(CTRL_C)

    def ends(self, code: int) -> str:
        """Wait for the end and return the output since the last question."""
        self.child.expect(pexpect.EOF)
        assert self.process.wait() == code, self.child.before
        return self.child.before or ""

    def close(self) -> None:
        """End the process if it is still running."""
        self.process.kill()
        self.child.close()


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


@pytest.mark.case(45)
@pytest.mark.parametrize(("term", "columns"), [("xterm-256color", 80), ("dumb", 40)])
def test_five_steps_on_a_terminal_write_a_config_that_trains(
    tmp_path: Path, terminals: list[Terminal], term: str, columns: int
) -> None:
    terminal = Terminal(tmp_path, "--accelerator", "cpu", term=term, columns=columns)
    terminals.append(terminal)
    plain = term == "dumb"
    terminal.answer("Model: the LightningModule", "tests.support.toy.NoModule")
    terminal.child.expect("NoModule is no")
    terminal.answer("Model: the LightningModule", "tests.support.toy.Toy" if plain else "\b" * 8 + "Toy")
    terminal.answer("Its arguments", "lr: 1e-2")
    terminal.child.expect_exact("161 parameters")
    terminal.answer("Data: the LightningDataModule", "tests.support.toy.ToyData")
    terminal.answer("Its arguments", "size: 32")
    terminal.answer("Samples per", "8" if not plain else "12")
    terminal.answer("Passes over", "2")
    terminal.child.expect_exact("Begin with a preset?")
    if not plain:
        # Long texts continue on the next line instead of being cut.
        terminal.child.expect_exact("with a full copy of the model on each")
        terminal.child.expect_exact("     (DDP).")
    terminal.press("after a requeue" if not plain else "number, 1 to", "\r")
    terminal.answer("Ranks on each node", "8" if plain else "3")
    terminal.answer("Nodes", "")
    # Eight samples cannot be shared by three ranks.
    terminal.answer("Batch and ranks do not fit. What do you change?", "1" if plain else "")
    terminal.answer("Ranks on each node", "-" if plain else "\b")
    terminal.answer("Nodes", "")
    terminal.child.expect_exact("Plan")
    terminal.answer("Train in mixed precision?", "2" if plain else DOWN)
    terminal.answer("Strategy", "")
    terminal.child.expect_exact("Plan")
    terminal.answer("Weights & Biases", "4" if plain else DOWN * 3)
    terminal.answer("Name of the run", "from-wizard")
    terminal.answer("What now?", "")
    assert "wrote run.yaml" in terminal.ends(0)

    config = load_config([tmp_path / "run.yaml"])
    assert config.model == {"class_path": "tests.support.toy.Toy", "init_args": {"lr": 0.01}}
    assert config.data == {"class_path": "tests.support.toy.ToyData", "init_args": {"size": 32}}
    batch = 12 if plain else 8
    assert (config.use_amp, config.global_batch_size, config.wandb.mode) == (True, batch, "disabled")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["run.yaml"]

    env = {"PYTHONPATH": str(REPOSITORY), "TRACE": str(tmp_path / "trace")}
    run_warm(launcher("fit", "--config", "run.yaml"), tmp_path, env=env).check()
    finished = only_run(tmp_path)
    assert finished.name == "from-wizard"
    (planned,) = events_of(finished, "planned")
    assert planned["plan"]["batch"]["global_batch_size"] == batch


@pytest.mark.parametrize("question", ["Model: the", "Begin with", "Train in mixed", "Weights & Biases", "What now?"])
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_ctrl_c_at_a_question_writes_nothing(
    tmp_path: Path, terminals: list[Terminal], question: str, term: str
) -> None:
    before = "# mine\nseed: 1\n"
    (tmp_path / "run.yaml").write_text(before)
    terminal = Terminal(tmp_path, "--accelerator", "cpu", term=term)
    terminals.append(terminal)
    for asked in ("Model: the", "Begin with", "Ranks on", "Nodes", "Train in mixed", "Strategy", "Weights & Biases",
                  "W&B project", "Name of", "What now?"):  # fmt: skip
        if asked == question:
            break
        terminal.answer(asked)
    terminal.cancel(question)
    terminal.ends(130)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("run.yaml", before)]


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_the_end_of_the_input_writes_nothing(tmp_path: Path, terminals: list[Terminal], term: str) -> None:
    terminal = Terminal(tmp_path, term=term)
    terminals.append(terminal)
    terminal.press("Model: the", CTRL_D)
    assert "cancelled; nothing was written" in terminal.ends(130)
    assert list(tmp_path.iterdir()) == []
