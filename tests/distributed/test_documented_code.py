"""Python blocks of README and docs, run as a user would run them. The user's package is `my_pkg`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.documentation import blocks, write_user_files
from tests.support.processes import run_warm
from tests.support.runs import events_of, only_run, toy_env
from tests.support.wandb_file import history_rows

pytestmark = pytest.mark.slow


def run_block(folder: Path, page: str, contains: str, before: str = "", after: str = "") -> str:
    """Run the page's only block with this text as a script, between two texts, and return its output."""
    (block,) = (block for block in blocks("python") if block.page == page and contains in block.text)
    write_user_files(folder)
    (folder / "train.py").write_text(before + block.text + after)
    env = {**toy_env(folder / "trace"), "WANDB_MODE": "offline"}
    return run_warm([sys.executable, "train.py"], folder, env=env, timeout=240).check().output


def test_the_coordinators_script_trains_on_two_ranks(tmp_path: Path) -> None:
    output = run_block(tmp_path, "docs/how-to/scripts-and-notebooks.md", 'output_dir="runs"')
    (planned,) = events_of(only_run(tmp_path), "planned")
    assert planned["plan"]["world_size"] == 2
    # Both ranks print to one unbuffered pipe, so parts of a line may mix, but not the parts of one write.
    assert output.count("/checkpoints/") == 2, "each rank prints its result"
    assert only_run(tmp_path).joinpath("checkpoints", "last.ckpt").is_file()


def test_a_function_runs_on_two_ranks(tmp_path: Path) -> None:
    # The ranks would import it too, and need it not.
    before = 'import sys\ndel sys.modules["lightning.pytorch"]\n'
    output = run_block(tmp_path, "docs/how-to/scripts-and-notebooks.md", "import launch", before)
    assert output.splitlines()[-1] == "[2.0, 2.0]"
    assert "[rank 1] sum: 2.0" in output


def test_the_callback_logs_in_the_users_trainer(tmp_path: Path) -> None:
    run_block(tmp_path, "docs/how-to/falling-loss-scale.md", "AmpWandbCallback")
    rows = [row for row in history_rows(tmp_path) if row.get("amp/enabled")]
    # On a CPU Lightning replaces 16-mixed by bf16-mixed, which has no loss scale.
    assert rows
    assert {row["amp/precision"] for row in rows} <= {"bf16-mixed", "16-mixed"}
    assert all("perf/step_seconds" in row for row in rows)


def test_fit_from_python_and_a_config_written_from_python(tmp_path: Path) -> None:
    # The toy has 64 samples: the config of the page asks for 256 in a step.
    smaller = (
        "from pathlib import Path\nfile = Path('run.yaml')\nfile.write_text(file.read_text().replace('256', '8'))\n"
    )
    output = run_block(tmp_path, "docs/tutorials/own-model.md", "load_config", before=smaller)
    assert "last.ckpt" in output
    run_block(tmp_path, "docs/how-to/scripts-and-notebooks.md", "WizardConfig")
    assert "use_amp: true" in (tmp_path / "debug.yaml").read_text()


def test_a_strategy_of_the_users_own_trains_on_two_ranks(tmp_path: Path) -> None:
    train = """
from launcher import TrainingCoordinator
from my_pkg import MyData, MyModule
from strategies.registry import register

register(CompressedDdp())
TrainingCoordinator(devices=2, precision="32-true", strategy="ddp_compressed").train(MyModule(), MyData())
"""
    # The launcher is imported first: its `strategies` may be found nowhere else.
    run_block(tmp_path, "docs/how-to/extend.md", "CompressedDdp", before="import launcher\n", after=train)
    (planned,) = events_of(only_run(tmp_path), "planned")
    assert planned["plan"]["strategy"]["name"] == "ddp_compressed"
    assert only_run(tmp_path).joinpath("checkpoints", "last.ckpt").is_file()
