"""Ranks that would train different models are reported on every rank, before a model is built."""

from __future__ import annotations

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.processes import launcher, run_warm
from tests.support.runs import REPOSITORY, TOY, free_port, start_by_hand, toy_env

pytestmark = pytest.mark.slow
SETTINGS = (*TOY, "--global_batch_size", "8", "--trainer.max_epochs", "1")


def _nothing_trained(folder: Path) -> bool:
    return not list(folder.glob("trace-*")) and not list(folder.glob("runs/*/checkpoints"))


def test_ranks_with_different_configs_are_reported_with_the_setting(tmp_path: Path) -> None:
    arguments = [SETTINGS, (*SETTINGS, "--model.lr", "0.5")]
    zero, one = start_by_hand(arguments, tmp_path, toy_env(tmp_path / "trace"))

    assert (zero.code, one.code) == (2, 2)
    assert re.search(r"model\.init_args\.lr: None on rank 0 \(.+\), 0\.5 on rank 1 \(", zero.output), zero.output
    assert "Traceback" not in zero.output
    assert one.output == "", "only rank zero writes to the terminal"
    assert _nothing_trained(tmp_path)


def test_a_rank_whose_code_fails_to_import_is_reported_and_all_ranks_stop(tmp_path: Path) -> None:
    arguments = [SETTINGS, ("--model", "no.Such", *SETTINGS[2:])]
    zero, one = start_by_hand(arguments, tmp_path, toy_env(tmp_path / "trace"))

    assert (zero.code, one.code) == (2, 2)
    assert re.search(
        r"rank 1 \(.+\): .*model\.class_path: no\.Such does not import: ModuleNotFoundError", zero.output, re.S
    )
    assert _nothing_trained(tmp_path)


def test_a_rank_with_a_broken_config_is_reported(tmp_path: Path) -> None:
    arguments = [SETTINGS, (*SETTINGS, "--trainer.max_epochs", "many")]
    zero, one = start_by_hand(arguments, tmp_path, toy_env(tmp_path / "trace"))

    assert (zero.code, one.code) == (2, 2)
    assert re.search(r"rank 1 \(.+\): the config has 1 problem:\s+trainer\.max_epochs: given 'many'", zero.output)


def test_the_same_error_on_every_rank_is_reported_once_without_ranks(tmp_path: Path) -> None:
    arguments = [(*SETTINGS, "--seed", "x")] * 2
    zero, one = start_by_hand(arguments, tmp_path, toy_env(tmp_path / "trace"))

    assert (zero.code, one.code) == (2, 2)
    assert zero.output.startswith("error: the config has 1 problem:")
    assert one.output == ""


def test_a_missing_rank_is_reported_within_the_timeout(tmp_path: Path) -> None:
    arguments = [(*SETTINGS, "--agreement_timeout", "8")] * 2
    outputs = start_by_hand(arguments, tmp_path, toy_env(tmp_path / "trace"), world_size=3)

    assert [finished.code for finished in outputs] == [2, 2]
    assert re.search(r"rank 2 \(node 0\) did not arrive: rank 0 \(.+\) timed out", outputs[0].output)
    assert _nothing_trained(tmp_path)


SCRIPT = """
import mine
from launcher import TrainingCoordinator
from launcher.config.schema import WandbOptions
TrainingCoordinator("runs", use_gpu=False, precision="32", wandb=WandbOptions(mode="disabled")).train(
    mine.Mine(), datamodule=mine.ToyData(), max_epochs=1, num_sanity_val_steps=STEPS, name="a")
"""


@pytest.mark.parametrize("differs", ["module", "script"])
def test_ranks_with_different_files_of_the_same_name_are_reported(tmp_path: Path, differs: str) -> None:
    port = free_port()

    def one(rank: int) -> tuple[int, str]:
        node = tmp_path / f"node-{rank}"
        node.mkdir()
        factor = 1 + rank * (differs == "module")
        (node / "mine.py").write_text(
            "from tests.support.toy import Toy, ToyData\nclass Mine(Toy):\n    def training_step(self, batch, i):\n"
            f"        return {factor} * super().training_step(batch, i)\n"
        )
        (node / "train.py").write_text(SCRIPT.replace("STEPS", str(rank * (differs == "script"))))
        arguments = launcher("fit", "--model", "mine.Mine", *SETTINGS[2:], "--runs_dir", str(tmp_path / "runs"))
        own = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank,
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        env = {"PYTHONPATH": f"{node}{os.pathsep}{REPOSITORY}", **{name: str(value) for name, value in own.items()}}
        if differs == "script":
            arguments = [sys.executable, "train.py"]
        done = run_warm(arguments, node, env=env)
        return done.code, done.output

    with ThreadPoolExecutor(2) as pool:
        (code, output), (other, _) = pool.map(one, range(2))
    assert 0 not in (code, other), output
    file = "mine.py" if differs == "module" else "train.py"
    assert re.search(rf"code: {re.escape(file)} differs on rank 1 \(.+\) from rank 0 \(", output), output
    assert not list(tmp_path.glob("runs/*/checkpoints"))


def test_ranks_of_mpirun_are_one_world_and_user_modules_see_their_rank(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "mine.py").write_text(
        "import os\nfrom tests.support.toy import Toy, ToyData\nRANK = os.environ.get('RANK')\nclass Mine(Toy):\n"
        "    def on_fit_start(self):\n        open(f'seen-{self.global_rank}', 'w').write(f'{RANK} of "
        "{self.trainer.world_size}')\n"
    )
    arguments = ("fit", "--model", "mine.Mine", *SETTINGS[2:])

    def one(rank: int) -> tuple[int, str]:
        places = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
        own = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in places.items()}
        env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), **own}  # fmt: skip
        done = run_warm(launcher(*arguments), tmp_path, env=env)
        return done.code, done.output

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(one, range(2)))
    assert [code for code, _ in ended] == [0, 0], ended
    assert [(tmp_path / f"seen-{rank}").read_text() for rank in range(2)] == ["0 of 2", "1 of 2"]
    assert ended[1][1] == "", "only rank zero writes to the terminal"
