"""Suggestions for keys that do not exist: each one is a true setting that the loader then accepts."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from launcher.config.command_line import read_overrides
from launcher.config.loading import load_config
from launcher.config.schema import RunConfig, config_fields
from launcher.config.suggestions import ClassFindings, CommandKeys
from launcher.config.synonyms import ADVICE, SAME_ARGUMENT, SYNONYMS, VALUES
from launcher.core.errors import ConfigError

KEYS = [path for path, _ in config_fields()]
# A valid value of each setting that a synonym stands for; 3 for the others.
SAMPLES = {
    "accelerator": "cuda", "precision": "bf16", "resume": "last.ckpt", "runs_dir": "out", "name": "first",
    "strategy": "ddp", "checkpoint.monitor": "val_loss", "wandb.project": "mine", "wandb.entity": "me",
    "wandb.group": "some", "wandb.tags": "[a, b]", "wandb.mode": "offline", "data": "pkg.Data", "model": "pkg.Model",
    "optimizer": "torch.optim.Adam", "lr_scheduler": "torch.optim.lr_scheduler.StepLR", "deepspeed_config": "ds.json",
    "trainer.max_time": "00:01:00:00", "fsdp.wrap": "[Block]", "checkpoint.background": "false",
}  # fmt: skip


def message(arguments: list[str], command: CommandKeys | None = None) -> str:
    """The message about the first problem."""
    with pytest.raises(ConfigError) as caught:
        load_config([], arguments, command or CommandKeys())
    return caught.value.problems[0].message


def suggestion(text: str) -> str:
    found = re.fullmatch(r"unknown key; did you mean (.*)\?", text)
    assert found is not None, text
    return found[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    return tmp_path


@pytest.mark.parametrize("name", SYNONYMS)
def test_each_suggestion_for_another_tools_name_is_accepted(folder: Path, name: str) -> None:
    first = SYNONYMS[name].split(" ")[0]
    given = [] if "=" in first else [SAMPLES.get(first, "3")]
    shown = suggestion(message([f"--{name}", *given]))
    if "_" in name:
        assert suggestion(message([f"--{name.replace('_', '-')}", *given])) == shown
    arguments = shlex.split(shown.partition(" or ")[0])
    assert arguments[0] == f"--{first.partition('=')[0]}"
    assert yaml.safe_load(arguments[1]) == yaml.safe_load(given[0] if given else first.partition("=")[2])
    more = ["--model", "pkg.Model"] if first == "data" else []
    assert isinstance(load_config([], [*arguments, *more]), RunConfig)
    # In a file, the same settings without dashes.
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({name: yaml.safe_load(given[0]) if given else True}))
    with pytest.raises(ConfigError) as caught:
        load_config([file])
    assert re.split(r"[:,]| or ", suggestion(caught.value.problems[0].message))[0] == first.partition("=")[0]


def test_no_name_of_another_tool_is_a_setting() -> None:
    assert not {*SYNONYMS, *ADVICE["settings"]} & {*KEYS, *(path.partition(".")[0] for path in KEYS)}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in VALUES.items() for value in values])
def test_a_value_of_another_tool_is_replaced(key: str, value: str) -> None:
    name = {"precision": "mixed_precision", "accelerator": "device", "devices": "nproc",
            "strategy": "distributed_strategy"}[key]  # fmt: skip
    arguments = shlex.split(suggestion(message([f"--{name}", value])))
    assert arguments == [f"--{key}", VALUES[key][value]]
    load_config([], arguments)


def test_a_deepspeed_file_is_suggested_with_the_strategy_of_its_stage(folder: Path) -> None:
    assert suggestion(message(["--deepspeed", "ds.json"])) == "--deepspeed_config ds.json --strategy deepspeed_stage_3"
    assert message(["--deepspeed", "none.json"]).endswith("--strategy deepspeed_stage_2?")


@pytest.mark.parametrize("path", KEYS)
def test_a_missing_letter_is_found_in_every_key(path: str) -> None:
    """A suggestion is always a key; it is the right one unless another key is as near."""
    group, dot, name = path.rpartition(".")
    middle = len(name) // 2
    misspelt = f"{group}{dot}{name[:middle]}{name[middle + 1 :]}"
    text = message([f"--{misspelt}", "3"])
    found = re.findall(r"--(\S+)", text)
    assert found, text
    assert set(found) <= {*KEYS, *(each.partition(".")[0] for each in KEYS)}
    if len(name) > 5:
        assert path in found, text


@pytest.mark.parametrize("prefix", ["--trainer.", "--"])
def test_the_arguments_of_the_classes_are_suggested(prefix: str) -> None:
    found = ClassFindings((), {"model.init_args.lr": False, "data.init_args.batch_size": False})
    command = CommandKeys(inspect=lambda config: found)
    named = ["--model", "pkg.Model", "--data", "pkg.Data"]
    for group, expected in ((SAME_ARGUMENT[0], "model.init_args.lr"), (SAME_ARGUMENT[1], "data.init_args.batch_size")):
        for name in group:
            assert suggestion(message([*named, f"{prefix}{name}", "0.1"], command)) == f"--{expected} 0.1"
    assert message([*named, "--num_workers", "2"], command) == (
        "unknown key; no class takes it; they take model.init_args.lr, data.init_args.batch_size"
    )
    assert "--model.init_args.lr 0.1" in message(["--lr", "1"], command), "without a class of the user"


def test_the_options_of_the_command_and_their_synonyms_are_suggested() -> None:
    command = CommandKeys(
        ("--nproc-per-node", "--json"), {"procs": "--nproc-per-node", "gres": "write --gpus N", "n": "--json"}
    )
    assert suggestion(message(["--nproc_per_nod", "2"], command)) == "--nproc-per-node 2"
    assert suggestion(message(["--procs=2"], command)) == "--nproc-per-node 2"
    assert message(["--gres", "gpu:1"], command) == "unknown key; write --gpus N"
    assert message(["-n", "2"], command) == "unknown option; did you mean --json 2?"
    assert message(["-q", "2"], command) == "not an option; give settings as --key value or --key=value"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("val_every", "--trainer.check_val_every_n_epoch 5 or --trainer.val_check_interval 5"),
        ("eval_freq", "--trainer.check_val_every_n_epoch 5 or --trainer.val_check_interval 5"),
        ("val_every_n_epochs", "--trainer.check_val_every_n_epoch 5"),
        ("check_val_every", "--trainer.check_val_every_n_epoch 5"),
        ("val_chek_interval", "--trainer.val_check_interval 5"),
        ("checkpoint_every", "--checkpoint.every_n_steps 5 or --checkpoint.every_n_epochs 5"),
        ("save_every_n_steps", "--checkpoint.every_n_steps 5"),
        ("save_every_n_epochs", "--checkpoint.every_n_epochs 5"),
        ("log_every_n", "--trainer.log_every_n_steps 5"),
        ("log_every", "--trainer.log_every_n_steps 5"),
        ("total_epochs", "--trainer.max_epochs 5"),
        ("maxepochs", "--trainer.max_epochs 5"),
        ("trainer_max_epochs", "--trainer.max_epochs 5"),
        ("max_epoch", "--trainer.max_epochs 5"),
        ("trainer.max_epcohs", "--trainer.max_epochs 5"),
        ("max_iter", "--trainer.max_steps 5"),
        ("limit_train", "--trainer.limit_train_batches 5"),
        ("limit_val", "--trainer.limit_val_batches 5"),
        ("overfit", "--trainer.overfit_batches 5"),
        ("clip_norm", "--trainer.gradient_clip_val 5"),
        ("accumulate_grad", "--trainer.accumulate_grad_batches 5"),
        ("no_progress_bar", "--trainer.enable_progress_bar false"),
        ("percision", "--precision 5"),
        ("num_gpu", "--devices 5 --accelerator gpu"),
        ("node", "--num_nodes 5"),
        ("resume_run", "--resume 5"),
        ("auto_resume", "--resume auto"),
        ("checkpoint_dir", "--runs_dir 5"),
        ("run-dir", "--runs_dir 5"),
        ("total_batch_size", "--global_batch_size 5"),
        ("zero3", "--strategy deepspeed_stage_3"),
        ("half_precision", "--precision 16-mixed"),
        ("slurm_partition", "--slurm.partition 5"),
    ],
)
def test_a_plausible_mistake_suggests_what_is_meant(given: str, meant: str) -> None:
    assert suggestion(message([f"--{given}", "5"])) == meant


@pytest.mark.parametrize(
    "given", ["mini_batch_size", "val_batch_size", "eval_strategy", "wandb_id", "train_dir",
              "fsdp_strategy", "use_wandb", "save_strategy", "momentum", "device_ids", "verbose", "model_name", "ema"],
)  # fmt: skip
def test_a_name_with_another_meaning_suggests_no_similar_key(given: str) -> None:
    text = message([f"--{given}", "5"])
    assert "did you mean" not in text
    assert text.startswith("unknown key; ")


def test_an_argument_of_a_class_is_meant_before_the_advice_for_its_name() -> None:
    found = ClassFindings((), {"model.init_args.stage": False})
    command = CommandKeys(inspect=lambda config: found)
    assert suggestion(message(["--model", "pkg.Model", "--stage", "1"], command)) == "--model.init_args.stage 1"


def test_one_tag_is_suggested_as_a_list() -> None:
    assert suggestion(message(["--tags", "a"])) == "--wandb.tags '[a]'"
    assert load_config([], ["--wandb.tags", "[a]"]).wandb.tags == ["a"]


@pytest.mark.parametrize(
    ("value", "strategy"),
    [("full_shard auto_wrap", "fsdp2"), ("full_shard,offload", "fsdp2_offload"), ("shard_grad_op", "fsdp2_grad_op"),
     ("hybrid_shard auto_wrap", "hsdp"), ("hsdp", "hsdp"), ("true", "fsdp2")],
)  # fmt: skip
def test_a_text_in_place_of_the_settings_of_fsdp_is_a_strategy(value: str, strategy: str) -> None:
    text = message([f"--fsdp={value}"])
    assert text.endswith(f"; expected a mapping of settings; did you mean --strategy {strategy}?")
    assert load_config([], ["--strategy", strategy]).strategy == strategy


def test_one_name_in_place_of_a_list_is_shown_as_a_list() -> None:
    assert message(["--wandb.tags", "first"]) == "given 'first'; expected a list; write [first]"
    assert load_config([], ["--wandb.tags", "[first]"]).wandb.tags == ["first"]


@pytest.mark.parametrize("given", ["Block", "[Block]", "pkg.model.Block", "[pkg.model.Block]"])
def test_a_block_class_is_a_name_or_a_path_in_a_list_or_not(given: str) -> None:
    assert load_config([], ["--fsdp.wrap", given]).fsdp.blocks == ("Block",)


def test_a_suggestion_never_shows_a_secret() -> None:
    assert "hunter2" not in message(["--wandb_api_key", "hunter2"])


@pytest.mark.parametrize("path", [*KEYS, "ckpt_path", "trainer.devices", "trainer.precision", "trainer.strategy",
                                  "trainer.accelerator", "model.class_path", "data.init_args"])  # fmt: skip
def test_a_setting_without_its_value_is_reported(path: str) -> None:
    hint = str(dict(config_fields()).get(path, ""))
    for after in ([], ["--seed", "1"]):
        if "bool" in hint:
            assert read_overrides([f"--{path}", *after])[1] == []
            continue
        _, (problem,) = read_overrides([f"--{path}", *after])
        assert (problem.path, problem.message) == (path, f"given without a value; write --{path} VALUE")


@pytest.mark.parametrize("group", ["trainer", "checkpoint", "wandb", "watch", "slurm"])
def test_a_group_without_a_setting_is_reported(group: str) -> None:
    _, (problem,) = read_overrides([f"--{group}"])
    assert f"write one of them, as in --{group}." in problem.message


def test_an_argument_of_a_class_without_a_value_is_reported_unless_it_is_a_flag() -> None:
    found = ClassFindings((), {"model.init_args.lr": False, "model.init_args.compile": True})
    command = CommandKeys(inspect=lambda config: found)
    config = load_config([], ["--model", "pkg.Model", "--model.compile"], command)
    assert config.model == {"class_path": "pkg.Model", "init_args": {"compile": True}}
    for key in ("--model.lr", "--model.init_args.lr"):
        with pytest.raises(ConfigError) as caught:
            load_config([], ["--model", "pkg.Model", key], command)
        assert str(caught.value).endswith("model.init_args.lr: given without a value; write --model.init_args.lr VALUE")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--checkpoint", "a.ckpt"], "--resume a.ckpt"),
        (["--wandb", "mine"], "--wandb.project mine"),
        (["--wandb", "offline"], "--wandb.mode offline"),
    ],
)
def test_a_text_for_a_group_suggests_its_setting(given: list[str], meant: str) -> None:
    assert message(given).endswith(f"expected a mapping of settings; did you mean {meant}?")
    load_config([], meant.split())
