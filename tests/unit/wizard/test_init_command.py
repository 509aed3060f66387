"""`launcher init` without questions, and with existing files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from launcher.cli import main as cli
from launcher.config.loading import load_config
from launcher.core.errors import ConfigError
from launcher.wizard import command as init_command
from launcher.wizard.answers import WizardConfig
from launcher.wizard.wizard import SetupWizard


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    return tmp_path


def test_yes_writes_the_preset_with_the_settings_on_top(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init", "--yes", "--preset", "debug", "--trainer.limit_train_batches", "3", "--seed=7"]) == 0
    config = load_config(["run.yaml"])
    assert (config.seed, config.devices, config.trainer.limit_train_batches) == (7, 1, 3)
    output = capsys.readouterr().out
    assert output == "wrote run.yaml\n  launcher plan --config run.yaml\n  launcher fit --config run.yaml\n"
    assert "# Preset: debug.\n" in (folder / "run.yaml").read_text()
    assert "# To train: launcher fit --config run.yaml\n" in (folder / "run.yaml").read_text()


def test_a_file_overrides_the_preset_and_settings_override_the_file(folder: Path) -> None:
    (folder / "old.json").write_text('{"num_nodes": 1, "seed": 1, "precision": "bf16"}')
    arguments = ["init", "--yes", "--from", "old.json", "--preset", "debug", "--seed", "2", "-o", "new.json"]
    assert cli.run(arguments) == 0
    config = load_config(["new.json"])
    assert (config.num_nodes, config.seed, config.precision, config.strategy) == (1, 2, "bf16", "single_device")
    assert load_config(["old.json"]).seed == 1


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_a_batch_that_the_ranks_cannot_share_is_not_written(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["init", "--yes", "--devices", "2", "--global_batch_size", "7", "-o", name]) == 2
    assert (
        "global_batch_size 7 cannot be shared by 2 ranks; nearest: global_batch_size 6 or 8" in capsys.readouterr().err
    )
    with pytest.raises(ConfigError):
        WizardConfig(devices=2, global_batch_size=7).save(name)
    assert not (folder / name).exists()


def test_an_existing_file_is_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yaml").write_text("seed: 1\n")
    assert cli.run(["init", "--yes"]) == 2
    assert "run.yaml exists; give another --output, or start from it with `--from run.yaml`" in capsys.readouterr().err
    assert (folder / "run.yaml").read_text() == "seed: 1\n"


def test_each_edit_keeps_a_copy_of_the_previous_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yaml").write_text("# mine\nseed: 1\n")
    assert cli.run(["init", "--yes", "--from", "run.yaml", "--seed", "2"]) == 0
    assert cli.run(["init", "--yes", "--from", "run.yaml", "--seed", "3"]) == 0
    assert load_config(["run.yaml"]).seed == 3
    assert (folder / "run.yaml.1.bak").read_text() == "# mine\nseed: 1\n"
    assert load_config([folder / "run.yaml.2.bak"]).seed == 2
    assert "the previous file is run.yaml.1.bak" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--preset", "dbug"], "preset: given 'dbug'; did you mean debug?"),
        (["--precison", "16"], "precison: unknown key; did you mean precision?"),
        (["--precision", "15"], "is not a precision"),
        (["--from", "none.yaml"], "none.yaml: no such file"),
        (["--from", "cut.yaml"], "cut.yaml, line 2: the file is truncated here"),
        (["--model", "no_such_pkg.Net"], "model.class_path: no_such_pkg.Net does not import"),
        (["--model", "tests.support.toy.Toy", "--model.rate", "1"], "model.init_args.rate: Toy takes no rate"),
        (["-o", "no/such/run.yaml"], "no/such/run.yaml: cannot be written: No such file"),
        (["stray"], "stray: not an option"),
    ],
)
def test_invalid_input_is_reported_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    (folder / "cut.yaml").write_text("# Written by `launcher init`.\nseed: 1\n")
    assert cli.run(["init", "--yes", *arguments]) == 2
    assert text in capsys.readouterr().err
    assert [file.name for file in folder.iterdir()] == ["cut.yaml"]


def test_without_a_terminal_nothing_is_asked(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert cli.run(["init"]) == 2
    assert "init needs a terminal for its questions; run it in one, or give --yes" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("answer", [None, KeyboardInterrupt(), EOFError()])
def test_after_cancelling_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answer: BaseException | None
) -> None:
    def cancel(self: SetupWizard, start: WizardConfig | None = None) -> WizardConfig | None:
        if answer is not None:
            raise answer
        return None

    (folder / "run.yaml").write_text("seed: 1\n")
    monkeypatch.setattr("sys.stdin", _Terminal())
    monkeypatch.setattr("sys.stdout", _Terminal())
    monkeypatch.setattr(SetupWizard, "run", cancel)
    assert cli.run(["init"]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("run.yaml", "seed: 1\n")]


def test_the_help_lists_the_presets_of_this_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        init_command.run(["--help"])
    output = capsys.readouterr().out
    for name in ("debug", "single-gpu", "ddp-node", "slurm-multi-node"):
        assert f"  {name}" in output
