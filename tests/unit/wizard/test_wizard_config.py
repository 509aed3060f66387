"""The answers of the wizard: read, written, checked, and combined with presets."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import launcher.hardware.devices
from launcher.config.loading import load_config, read_preset
from launcher.config.presets import ALL_PRESETS, preset_names, preset_summary
from launcher.config.schema import RunConfig
from launcher.core.errors import ConfigError, Problem
from launcher.core.yaml_loader import Loader
from launcher.hardware.devices import Device, Hardware
from launcher.wizard.answers import WizardConfig
from strategies.precision import Precision
from strategies.registry import list_strategy_names

CPU = Hardware(Device("cpu", 0, "AMD EPYC", 1 << 34, ("fp32", "fp64")), 1, {})
OLD_GPU = Hardware(Device("cuda", 0, "Tesla V100", 1 << 34, ("fp32", "fp64", "fp16")), 2, {})
NEW_GPU = Hardware(Device("cuda", 0, "H100", 1 << 36, ("fp32", "fp64", "fp16", "bf16")), 8, {})

FULL = WizardConfig(
    model="my_pkg.MyModule",
    model_args={"lr": 1e-5, "note": "1e-4", "layers": [{"width": 8}], "text": "a: b # c\n\n 'd' ü"},
    data="my_pkg.MyData",
    data_args={},
    global_batch_size=256,
    max_epochs=3,
    max_steps=-1,
    accelerator="gpu",
    devices=8,
    num_nodes="auto",
    strategy="ddp",
    precision="bf16-mixed",
    use_mixed_precision=True,
    wandb_mode="offline",
    wandb_project="yes",
    name="2026",
    settings={
        "trainer.gradient_clip_val": 1.0,
        "trainer.callbacks": [{"class_path": "my_pkg.Own", "init_args": {"every": 2}}],
        "trainer.max_time": {"hours": 12},
        "checkpoint.every_n_steps": 500,
        "seed": 7,
        "wandb.tags": ["a", "1e3"],
        "model.dict_kwargs": {"more": None},
    },
)


def problems_of(path: Path) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        WizardConfig.load(path)
    return list(caught.value.problems)


@pytest.mark.case(23)
def test_mixed_precision_without_a_gpu_is_valid_with_a_warning() -> None:
    errors, warnings = checked = WizardConfig(use_mixed_precision=True).validate(CPU)
    assert checked.valid
    assert errors == ()
    (warning,) = warnings
    assert warning.path == "use_mixed_precision"
    assert "mixed precision is native on no rank" in warning.message
    assert "training in 32-true" in warning.message


@pytest.mark.case(23)
def test_without_given_hardware_this_machine_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.hardware.devices, "detect_hardware", lambda accelerator, local_rank: CPU)
    assert len(WizardConfig(use_mixed_precision=True).validate().warnings) == 1
    monkeypatch.setattr(launcher.hardware.devices, "detect_hardware", lambda accelerator, local_rank: NEW_GPU)
    assert WizardConfig(use_mixed_precision=True).validate() == ((), ())


def test_hardware_is_not_detected_if_no_answer_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(launcher.hardware.devices, "detect_hardware")
    assert WizardConfig(precision="auto", devices="auto", accelerator="cpu").validate() == ((), ())


@pytest.mark.parametrize("path", ["answers.yaml", "answers.json"])
@pytest.mark.parametrize(
    "config", [FULL, WizardConfig(), WizardConfig().with_preset("debug")], ids=["all", "none", "preset"]
)
@pytest.mark.case(24)
def test_a_saved_config_loads_unchanged(tmp_path: Path, path: str, config: WizardConfig) -> None:
    config.save(tmp_path / path)
    assert WizardConfig.load(tmp_path / path) == config
    assert (tmp_path / path).stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == [path]


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.case(24)
@settings(max_examples=100, deadline=None)
@given(arguments=st.dictionaries(st.text(min_size=1), _PLAIN, max_size=4))
def test_any_arguments_survive_the_commented_yaml(arguments: dict[str, Any]) -> None:
    config = WizardConfig(model="pkg.X", model_args=arguments, settings={"trainer.callbacks": [arguments]})
    assert yaml.load(config.to_yaml(), Loader) == config.values()  # noqa: S506 -- a SafeLoader


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.case(24)
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, suffix: str) -> None:
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    config = WizardConfig().with_preset("debug").with_answers(model="pkg.X", model_args={"lr": 0.1}, max_epochs=10)
    config.save(whole)
    text = whole.read_text().rstrip("\n")
    for length in range(len(text)):
        cut.write_text(text[:length])
        problems = problems_of(cut)
        assert problems, length
        assert all(problem.path.startswith(f"{cut}, line ") for problem in problems), problems


@pytest.mark.case(24)
def test_an_empty_file_is_truncated_and_a_hand_written_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "answers.yaml"
    file.write_text("")
    assert problems_of(file)[0].path == f"{file}, line 1"
    file.write_text("devices: 2\n")
    assert WizardConfig.load(file) == WizardConfig(devices=2)


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("trainer: {max_epoch: 3}", "trainer.max_epoch", "unknown key; did you mean trainer.max_epochs?"),
        ("precison: bf16", "precison", "unknown key; did you mean precision?"),
        ("use_amp: perhaps", "use_amp", "given 'perhaps'; expected true or false or null"),
        ("devices: many", "devices", "given 'many'; expected a whole number or auto"),
        ("global_batch_size: 0", "global_batch_size", "given 0; expected at least 1"),
        ("model: {class_path: nodots}", "model.class_path", "given 'nodots'; expected an import path"),
        ("- a list", "{file}", "found list; expected a mapping of settings"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.case(24)
def test_an_unknown_key_or_wrong_type_is_named(
    tmp_path: Path, text: str, path: str, message: str, as_json: bool
) -> None:
    file = tmp_path / f"answers.{'json' if as_json else 'yaml'}"
    file.write_text(json.dumps(yaml.safe_load(text)) if as_json else text)
    (problem,) = problems_of(file)
    assert problem.path == path.format(file=file)
    assert message in problem.message


@pytest.mark.case(24)
def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "answers.yaml"
    file.write_text("sed: 1\ndevices: 0\nprecision: fp15\n")
    assert [problem.path for problem in problems_of(file)] == ["sed", "devices", "precision"]


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.case(25)
def test_the_user_s_mixed_precision_overrides_a_preset_in_any_order(preset: str, wanted: bool) -> None:
    if preset not in preset_names():
        pytest.skip(f"{read_preset(preset)['strategy']} is no strategy of this version")
    before = WizardConfig(use_mixed_precision=wanted).with_preset(preset)
    after = WizardConfig().with_preset(preset).with_answers(use_mixed_precision=wanted)
    assert before == after == after.with_preset(preset)
    assert before.use_mixed_precision is wanted
    assert before.to_run_config().use_amp is wanted


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.case(25)
def test_precision_answers_override_those_of_a_preset(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    preset = {"use_amp": not wanted, "precision": "bf16-mixed", "trainer": {"max_epochs": 9}}
    monkeypatch.setattr("launcher.wizard.answers.preset_values", lambda name: preset)
    before = WizardConfig(use_mixed_precision=wanted).with_preset("own")
    after = WizardConfig().with_preset("own").with_answers(use_mixed_precision=wanted)
    assert before == after
    assert (before.use_mixed_precision, before.precision, before.max_epochs) == (wanted, None, 9)
    order = WizardConfig(precision="64").with_preset("own")
    assert order == WizardConfig().with_preset("own").with_answers(precision="64")
    assert (order.use_mixed_precision, order.precision) == (None, "64")


def test_every_explicit_answer_overrides_every_preset_in_any_order() -> None:
    given = {"devices": 3, "strategy": "ddp", "max_epochs": 5, "wandb_mode": "online"}
    for first, second in itertools.permutations(preset_names(), 2):
        config = WizardConfig(**given).with_preset(first).with_preset(second)
        assert {name: getattr(config, name) for name in given} == given
        assert config == WizardConfig().with_preset(second).with_answers(**given)


def test_another_preset_replaces_the_first() -> None:
    config = WizardConfig(settings={"seed": 3, "trainer.log_every_n_steps": 50}).with_preset("debug")
    assert config.settings["trainer.limit_train_batches"] == 20
    assert config.settings["trainer.log_every_n_steps"] == 50, "the user's own"
    config = config.with_preset("ddp-node")
    assert config.settings == {"seed": 3, "trainer.log_every_n_steps": 50}
    assert (config.strategy, config.max_epochs, config.preset) == ("ddp", None, "ddp-node")


@pytest.mark.parametrize("wrong", ["fp15", "17", "", 7, "mixed"])
@pytest.mark.case(26)
def test_an_invalid_precision_is_an_error_that_lists_the_valid_ones(wrong: str | int) -> None:
    checked = WizardConfig(precision=wrong).validate(CPU)
    assert not checked.valid
    (error,) = checked.errors
    assert error.path == "precision"
    assert f"{wrong!r} is not a precision" in error.message
    for valid in (*Precision, "auto"):
        assert valid in error.message
    with pytest.raises(ConfigError, match="is not a precision"):
        WizardConfig(precision=wrong).to_run_config()


def test_errors_have_the_names_of_the_answers() -> None:
    config = WizardConfig(use_mixed_precision="perhaps", max_epochs=-5, wandb_mode="on", model="x", settings={"sed": 1})  # type: ignore[arg-type]
    assert {e.path for e in config.validate(CPU).errors} == {
        "use_mixed_precision", "max_epochs", "wandb_mode", "model", "sed"}  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "hardware", "path", "message"),
    [
        ({"precision": "bf16-mixed"}, OLD_GPU, "precision", "Tesla V100) cannot run it natively"),
        ({"accelerator": "gpu"}, CPU, "accelerator", "this machine has none"),
        ({"devices": 4}, OLD_GPU, "devices", "this machine has 2"),
        (
            {"use_mixed_precision": False, "precision": "16"},
            OLD_GPU,
            "use_mixed_precision",
            "false overrides precision 16",
        ),
        ({"use_mixed_precision": True, "precision": 32}, NEW_GPU, "use_mixed_precision", "true overrides precision 32"),
        ({"model": "pkg.X"}, CPU, "max_epochs", "1000 epochs"),
    ],
)
def test_requests_that_this_hardware_cannot_meet_are_warnings(
    answers: dict[str, Any], hardware: Hardware, path: str, message: str
) -> None:
    errors, warnings = WizardConfig(**answers).validate(hardware)
    assert errors == ()
    assert [w.path for w in warnings] == [path]
    assert message in warnings[0].message


@pytest.mark.parametrize(
    ("answers", "hardware"),
    [
        ({"precision": "16-mixed", "devices": 4}, CPU),
        ({"use_mixed_precision": True, "accelerator": "gpu", "devices": 8}, NEW_GPU),
        ({"model": "pkg.X", "max_steps": 10}, CPU),
        ({"model": "pkg.X", "settings": {"trainer.max_time": "00:01:00:00"}}, CPU),
        ({"precision": "bf16", "settings": {"precision_fallback": False}}, NEW_GPU),
    ],
)
def test_no_warning_if_the_hardware_meets_the_request(answers: dict[str, Any], hardware: Hardware) -> None:
    assert WizardConfig(**answers).validate(hardware) == ((), ())


@pytest.mark.case(45)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize(
    "config", [FULL, WizardConfig(), WizardConfig().with_preset("debug")], ids=["all", "none", "preset"]
)
def test_fit_reads_the_answers_from_the_written_file(tmp_path: Path, suffix: str, config: WizardConfig) -> None:
    file = tmp_path / f"run{suffix}"
    config.save(file, ("a comment\nseed: 99",))
    assert load_config([file]) == config.to_run_config()


def test_answers_are_in_the_run_config() -> None:
    run = FULL.to_run_config()
    assert run.model == {"class_path": "my_pkg.MyModule", "init_args": FULL.model_args, "dict_kwargs": {"more": None}}
    assert run.data == {"class_path": "my_pkg.MyData", "init_args": {}}
    assert (run.use_amp, run.precision, run.strategy) == (True, "bf16-mixed", "ddp")
    assert (run.devices, run.num_nodes, run.accelerator, run.name) == (8, "auto", "gpu", "2026")
    assert (run.wandb.mode, run.wandb.project, run.wandb.tags) == ("offline", "yes", ["a", "1e3"])
    assert (run.trainer.max_epochs, run.trainer.max_steps, run.trainer.max_time) == (3, -1, {"hours": 12})
    assert (run.global_batch_size, run.seed, run.checkpoint.every_n_steps) == (256, 7, 500)


def test_without_a_model_the_demo_is_trained() -> None:
    assert WizardConfig().to_run_config() == load_config()
    assert "# model:\n#   class_path: my_pkg.MyModule" in WizardConfig().to_yaml()


def test_the_yaml_comments_each_section_and_setting() -> None:
    lines = FULL.to_yaml(("launcher fit --config run.yaml",)).splitlines()
    assert lines[0] == "# Written by `launcher init`."
    assert lines[1] == "# launcher fit --config run.yaml"
    assert lines[-1] == "# End of the config."
    for key in ("global_batch_size: 256", "precision: bf16-mixed", "use_amp: true", "  max_epochs: 3"):
        assert lines[lines.index(key) - 1].strip().startswith("# "), key
    assert [line for line in lines if line.startswith("# ---")] == [
        "# --- Model and data ---", "# --- Hardware and cluster ---", "# --- Precision and strategy ---",
        "# --- Training ---", "# --- Run and logging ---"]  # fmt: skip


def test_a_config_with_errors_is_not_saved_and_the_old_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="is not a precision"):
        WizardConfig(precision="fp15").save(file)
    assert file.read_text() == "seed: 1\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\n")

    def broken(descriptor: int) -> None:
        raise error

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises((KeyboardInterrupt, ConfigError)):
        WizardConfig(precision="32").save(file)
    assert file.read_text() == "seed: 1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_link_to_a_config_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_text("seed: 1\n")
    (tmp_path / "link.yaml").symlink_to("real.yaml")
    WizardConfig(precision="32").save(tmp_path / "link.yaml")
    assert (tmp_path / "link.yaml").is_symlink()
    assert load_config([tmp_path / "real.yaml"]).precision == "32"


def test_a_complete_printed_config_can_be_edited_without_loss(tmp_path: Path) -> None:
    whole = load_config([], ["--model", "pkg.X", "--trainer.max_epochs", "3"])
    (tmp_path / "all.yaml").write_text(whole.to_yaml())
    assert WizardConfig.load(tmp_path / "all.yaml").to_run_config() == whole


def test_the_presets_of_this_version_are_those_whose_strategy_it_has() -> None:
    pending = {n for n in ALL_PRESETS if read_preset(n).get("strategy", "auto") not in list_strategy_names()}
    assert set(preset_names()) == set(ALL_PRESETS) - pending
    assert pending <= {"zero2-node", "zero3-offload"}, "only DeepSpeed's may be missing"


@pytest.mark.parametrize("name", ALL_PRESETS)
def test_every_preset_is_a_valid_config_with_a_summary(name: str) -> None:
    summary = preset_summary(name)
    assert 20 < len(summary) < 110
    assert not summary.startswith("#")
    if name in preset_names():
        assert isinstance(load_config([Path(launcher.__path__[0]) / "presets" / f"{name}.yaml"]), RunConfig)


@pytest.mark.parametrize("name", list_strategy_names())
def test_a_strategy_that_shards_needs_several_ranks(name: str) -> None:
    shards = name in ("fsdp2", "fsdp2_grad_op", "hsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
    text = f"given {name}, which shards over the ranks, but there is one; choose several ranks, or auto"
    expected = [Problem("strategy", text)] if shards else []
    assert WizardConfig(strategy=name, devices=1, num_nodes=1).errors() == expected
    assert WizardConfig(strategy=name, devices=1).errors() == [], "torchrun or SLURM may start more"


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="preset: given 'dbug'; did you mean debug\\? valid are debug, single-gpu"):
        WizardConfig().with_preset("dbug")
