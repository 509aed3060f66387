"""What a user reads and keeps when a run ends early: Ctrl-C in a terminal, a full disk, a failure before step one."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shlex
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.jobs.status import read_run_status
from tests.support.processes import Finished, launcher, run_warm
from tests.support.run_directories import small_disk
from tests.support.runs import TOY, events_of, toy_env
from tests.support.warm import DEEPSPEED, start

pytestmark = pytest.mark.slow
CTRL_C = b"\x03"
SETTINGS = (*TOY, "--global_batch_size", "8", "--trainer.log_every_n_steps", "1", "--trainer.enable_model_summary",
            "false", "--trainer.enable_progress_bar", "false", "--name", "it")  # fmt: skip
MODEL = '''
import os, signal, time
from torch.utils.data import DataLoader
from tests.support.toy import Numbers, Toy, ToyData

if os.environ["WAIT"] == "import" and os.environ.get("RANK") == "1":
    # Sees no signal, as in C code.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    open("blocked", "w").close()
    time.sleep(600)
if os.environ["WAIT"] == "import" and os.environ.get("RANK") == "0":
    while not os.path.exists("blocked"):
        time.sleep(0.01)
    print("now in import", flush=True)
    time.sleep(600)

class Slow(Toy):
    """Waits in the place that WAIT names until its terminal has pressed Ctrl-C, which creates a file."""
    def wait(self, place):
        if os.environ["WAIT"] == place and self.global_rank == 0:
            print("now in", place, flush=True)
            while not os.path.exists("pressed"):
                time.sleep(0.01)
    def __init__(self):
        super().__init__()
        self.wait("plan")
    def on_fit_start(self):
        self.wait("setup")
    def training_step(self, batch, batch_idx):
        if self.global_step == 3:
            self.wait("step")
        return super().training_step(batch, batch_idx)
    def validation_step(self, batch, batch_idx):
        self.wait("sanity" if self.trainer.sanity_checking else "validation")

class Data(ToyData):
    def val_dataloader(self):
        return DataLoader(Numbers(8), batch_size=4)
'''


class Terminal:
    """`launcher fit` in a pseudo-terminal of 80 columns."""

    def __init__(self, folder: Path, place: str, ranks: int) -> None:
        (folder / "slow.py").write_text(MODEL)
        own = ("--model", "slow.Slow", "--data", "slow.Data", "--trainer.max_epochs", "100", "--devices", str(ranks))
        env = {**os.environ, **toy_env(folder / "trace"), "WAIT": place, "TERM": "xterm", "PYTHONUNBUFFERED": "1"}
        self._folder = folder
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        self.process = start(["-m", "launcher", "fit", *SETTINGS, *own], folder, env, slave, terminal=True)
        os.close(slave)
        self.text = ""

    def press_when(self, text: str, received: str = "Ctrl-C: ") -> None:
        """Press Ctrl-C once the text is on the screen, and wait until the launcher has received it."""
        self.read_until(text)
        os.write(self.master, CTRL_C)
        self.read_until(received)
        (self._folder / "pressed").touch()

    def read_until(self, text: str | None) -> None:
        deadline = time.monotonic() + 60
        while text is None or text not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self.master], [], [], 1.0)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace").replace("\r\n", "\n")
                except OSError:
                    assert text is None, self.text
                    return

    def has(self, text: str, seconds: float) -> bool:
        """Whether the text is on the screen; reads for some seconds, unless it comes before."""
        end = time.monotonic() + seconds
        while text not in self.text and (left := end - time.monotonic()) > 0:
            if select.select([self.master], [], [], left)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace").replace("\r\n", "\n")
                except OSError:  # it has ended
                    assert text in self.text, self.text
        return text in self.text

    def close(self) -> None:
        self.process.kill()
        os.close(self.master)


@contextmanager
def terminal(folder: Path, place: str, ranks: int) -> Iterator[Terminal]:
    opened = Terminal(folder, place, ranks)
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.parametrize(
    ("place", "ranks", "announced"),
    [
        ("setup", 1, "saving after the first step"),
        ("sanity", 2, "saving after the first step"),
        ("step", 2, "saving at the next step boundary"),
        ("validation", 1, "saving after the validation and a step"),
    ],
)
def test_ctrl_c_in_a_terminal_prints_the_checkpoint_and_a_command_that_continues(
    tmp_path: Path, place: str, ranks: int, announced: str
) -> None:
    with terminal(tmp_path, place, ranks) as shown:
        shown.press_when(f"now in {place}")
        shown.read_until(None)
        assert shown.process.wait() == 130, shown.text
    run = tmp_path / "runs" / "it"
    step = events_of(run, "interrupted")[0]["step"]
    assert shown.text.count(f"Ctrl-C: {announced}; Ctrl-C again ends at once\n") == 1
    ending = f"stopped by Ctrl-C after step {step}; saved runs/it/checkpoints/last.ckpt\nto continue:\n"
    assert shown.text.count("stopped by Ctrl-C") == shown.text.count(ending) == 1, "once, not per rank"
    assert "Traceback" not in shown.text
    command = shlex.split(shown.text.partition(ending)[2].strip())
    assert command[-4:] == ["--name", "it", "--resume", "auto"]
    if place == "step":
        env = {**toy_env(tmp_path / "trace"), "WAIT": "nowhere"}
        again = run_warm(
            [sys.executable, *command[1:], "--trainer.max_steps", str(step + 1)], tmp_path, env=env
        ).check()
        assert events_of(run, "finished")[0]["step"] == step + 1, again.output


def test_ctrl_c_during_the_plan_prints_the_same_command(tmp_path: Path) -> None:
    with terminal(tmp_path, "plan", 1) as shown:
        shown.press_when("now in plan", "stopped by Ctrl-C before the first step; nothing was saved\nto start again:\n")
        shown.read_until(None)
        assert shown.process.wait() == 130, shown.text
    assert "Traceback" not in shown.text
    assert "--name it " in shown.text.partition("to start again:\n")[2]
    assert not (tmp_path / "runs" / "it").exists()


def test_ctrl_c_before_training_does_not_wait_for_a_rank_that_sees_no_signal(tmp_path: Path) -> None:
    with terminal(tmp_path, "import", 2) as shown:
        shown.press_when("now in import", "stopped by Ctrl-C before the first step; nothing was saved\n")
        shown.read_until(None)
        assert shown.process.wait() == 130, shown.text
    assert "failed first" not in shown.text


def test_a_second_ctrl_c_names_the_checkpoint_that_stays(tmp_path: Path) -> None:
    with terminal(tmp_path, "validation", 2) as shown:
        shown.read_until("now in validation")
        # The launcher counts repetitions within half a second, or two seconds on one rank, as one. A terminal discards
        # what is not read yet when it gets a Ctrl-C, so they must not come without a pause.
        while not shown.has("second Ctrl-C", 0.3):
            with contextlib.suppress(OSError):  # it has just ended
                os.write(shown.master, CTRL_C)
        shown.read_until(None)
        assert shown.process.wait() == 130, shown.text
    assert shown.text.count("second Ctrl-C: ended at once after step 8; nothing was saved\nto start again:\n") == 1
    assert "--name it-2 --resume none" in shown.text
    ended = events_of(tmp_path / "runs" / "it", "interrupted")
    assert [(each["second"], each["checkpoint"], each["reason"]) for each in ended] == [(True, None, "ctrl_c")]


def _fit_on_small_disk(tmp_path: Path, *arguments: str) -> Finished:
    # The layer makes checkpoints of 2 MB; the first one fits.
    (tmp_path / "wide.py").write_text(
        "from torch import nn\nfrom tests.support.toy import Toy\n\n\nclass Wide(Toy):\n    def __init__(self):\n"
        "        super().__init__()\n        self.net = nn.Sequential(nn.Linear(8, 18_000), nn.Linear(18_000, 1))\n"
    )
    own = ("--model", "wide.Wide", "--data.size", "32", "--runs_dir", "disk/runs", "--trainer.max_epochs", "9",
           "--checkpoint.save_top_k", "-1", "--devices", "2", "--max-restarts", "2")  # fmt: skip
    command = launcher("fit", *SETTINGS, *own, *arguments)
    return run_warm(command, tmp_path, env=toy_env(tmp_path / "t"), preloaded=DEEPSPEED if arguments else ())


@pytest.mark.parametrize("strategy", [(), ("--strategy", "deepspeed_stage_2")], ids=["ddp", "zero"])
def test_a_full_disk_names_the_space_and_the_checkpoint_and_causes_no_restart(
    tmp_path: Path, strategy: tuple[str, ...]
) -> None:
    with small_disk(tmp_path / "disk", "9m"):
        output = _fit_on_small_disk(tmp_path, *strategy).check(1).output
        run = tmp_path / "disk" / "runs" / "it"
        saved = sorted(path.name for path in (run / "checkpoints").iterdir())
        failed = [event for event in events_of(run, "failed") if event["reason"] == "disk_full"]
        (ended,) = events_of(run, "rank_failed")
        status = read_run_status(run)
    # Between the ranks' attempts to write, there may be room for one of them: then what is free is not stated.
    found = re.search(r"error: no space left on (\S+): (\S+ \SiB) needed(, \S+ (?:\Si)?B free)?; the last valid "
                      r"checkpoint is (\S+) \(step (\d+)\)", output)  # fmt: skip
    assert found, output
    assert found[3] or strategy, output
    assert found[1] == str(run / "checkpoints")
    assert Path(found[4]).name in saved
    assert all(not name.startswith(".") for name in saved), "no partial checkpoint"
    assert failed[0]["needed_bytes"] > max(failed[0]["free_bytes"] or 0, 500_000)
    assert failed[0]["folder"] == found[1]
    assert failed[0]["checkpoint"] == str(tmp_path / found[4])
    assert failed[0]["checkpoint_step"] == int(found[5])
    assert status.checkpoint_step == int(found[5]), "the one that was not written is not counted"
    assert (ended["reason"], ended["restart"]) == ("disk_full", False)
    assert ended["verdict"].startswith("no restart: the disk is full")
    assert "inline_container" not in output
    assert output.rstrip().endswith("--name it --resume auto"), "the command to continue"


def test_a_run_that_failed_before_its_first_step_is_started_again_under_its_name(tmp_path: Path) -> None:
    env = toy_env(tmp_path / "trace")
    arguments = (*SETTINGS, "--trainer.max_epochs", "1")
    (tmp_path / "broken.py").write_text(
        "from tests.support.toy import Toy\n\n\nclass Broken(Toy):\n    def configure_optimizers(self):\n"
        "        raise ValueError('no such optimizer')\n"
    )
    run_warm(launcher("fit", *arguments, "--model", "broken.Broken"), tmp_path, env=env).check(1)
    run = tmp_path / "runs" / "it"
    (failed,) = events_of(run, "failed")
    assert (failed["reason"], failed["checkpoint"], failed["step"]) == ("exception", None, None)
    run_warm(launcher("fit", *arguments), tmp_path, env=env).check()
    assert len(events_of(run, "run_started")) == 2, "the events of the failed attempt are kept"
    (finished,) = events_of(run, "finished")
    assert (finished["reason"], finished["epoch"]) == ("max_epochs", 1)
    logs = "".join(path.read_text() for path in (run / "logs").iterdir())
    assert "no such optimizer" in logs, "its log too"

    # The same name again, and fewer epochs than the run has.
    refused = run_warm(launcher("fit", *arguments), tmp_path, env=env).check(2).output
    assert "has trained to step 8; resume it with --resume auto" in refused
    more = ("--resume", "auto", "--trainer.max_epochs", "0")
    output = run_warm(launcher("fit", *arguments, *more, "--devices", "2"), tmp_path, env=env).check().output
    assert "nothing was left to train after step 8: the run has 1 epoch already" in output
    assert events_of(run, "finished")[1]["reason"] == "nothing_to_train"


def test_a_metric_that_is_never_logged_ends_the_training_after_a_checkpoint(tmp_path: Path) -> None:
    env = toy_env(tmp_path / "trace")
    (tmp_path / "validated.py").write_text(
        "from tests.support.toy import Toy, ToyData\n\n\nclass Model(Toy):\n"
        "    def validation_step(self, batch, batch_idx):\n        self.log('val/loss', batch[1].sum())\n\n\n"
        "class Data(ToyData):\n    val_dataloader = ToyData.train_dataloader\n"
    )
    arguments = (*SETTINGS, "--model", "validated.Model", "--data", "validated.Data", "--trainer.max_epochs", "2",
                 "--devices", "2", "--max-restarts", "2")  # fmt: skip
    command = launcher("fit", *arguments, "--checkpoint.monitor", "val_loss")
    output = run_warm(command, tmp_path, env=env).check(1).output
    run = tmp_path / "runs" / "it"
    assert "given 'val_loss', but the model logs loss, val/loss; did you mean val/loss?" in output
    assert "the last valid checkpoint is runs/it/checkpoints/last.ckpt (step 8)" in output
    assert "Traceback" not in output
    (ended,) = events_of(run, "rank_failed")
    assert (ended["reason"], ended["restart"], ended["exit_code"]) == ("usage", False, 1)
    more = launcher("fit", *arguments, "--checkpoint.monitor", "val/loss", "--resume", "auto")
    run_warm(more, tmp_path, env=env).check()
    assert events_of(run, "finished")[0]["step"] == 16
