"""`RunConfig`: every wrong field at once, what stands in for what, and a digest over all of it."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.schema import RunConfig, config_fields
from launcher.config.validation import find_problems, parse_config
from launcher.core.errors import ConfigError, Problem
from strategies.precision import Precision
from strategies.registry import list_strategy_names

LEAVES = dict(config_fields())
WITH_MINIMUM = sorted(path for path, info in LEAVES.items() if info.minimum is not None)


def nested(path: str, value: Any) -> dict[str, Any]:
    values = value
    for key in reversed(path.split(".")):
        values = {key: values}
    return values


def only_problem(path: str, value: Any) -> Problem:
    (problem,) = find_problems(nested(path, value))
    return problem


def changed(config: RunConfig, path: str, value: Any) -> RunConfig:
    group, _, key = path.rpartition(".")
    if not group:
        return dataclasses.replace(config, **{key: value})
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{key: value})})


def test_all_problems_are_listed_at_once_with_their_paths_in_order() -> None:
    values = {
        "seed": "many",
        "devices": 0,
        "nam": "x",
        "trainer": {"max_epochs": 1.5, "max_step": 3},
        "wandb": {"mode": "on"},
        "name": "a/b",
        "precision": "bf17",
        "strategy": "magic",
    }

    with pytest.raises(ConfigError) as caught:
        parse_config(values)

    paths = [problem.path for problem in caught.value.problems]
    assert paths == ["seed", "devices", "nam", "trainer.max_epochs", "trainer.max_step", "wandb.mode", "name",
                     "precision", "strategy"]  # fmt: skip
    text = str(caught.value)
    assert text.startswith("the config has 9 problems:\n")
    assert all(f"\n  {path}: " in text for path in paths)
    assert caught.value.exit_code == 2


def test_one_problem_is_counted_in_the_singular() -> None:
    with pytest.raises(ConfigError, match=r"^the config has 1 problem:\n  seed: "):
        parse_config({"seed": "many"})


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("global_batchsize", "global_batch_size"),
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("wandb.projct", "wandb.project"),
        # Right word, wrong level: both ways.
        ("max_epochs", "trainer.max_epochs"),
        ("trainer.global_batch_size", "global_batch_size"),
        ("wandb.max_epochs", "trainer.max_epochs"),
        ("max_epoch", "trainer.max_epochs"),
    ],
)
def test_an_unknown_key_suggests_the_nearest_one(path: str, meant: str) -> None:
    assert only_problem(path, 3) == Problem(path, f"unknown key; did you mean {meant}?")


def test_an_unknown_key_without_a_near_one_refers_to_the_help() -> None:
    assert only_problem("zzzzzz", 3).message == "unknown key; `launcher fit --help` lists all keys"


@pytest.mark.parametrize("group", ["trainer", "checkpoint", "wandb"])
def test_a_value_in_place_of_a_group_is_reported(group: str) -> None:
    assert only_problem(group, 3) == Problem(group, "given 3; expected a mapping of settings")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("seed", "many", "a whole number"),
        ("seed", 1.5, "a whole number"),
        ("devices", True, "a whole number or auto"),
        ("devices", "two", "a whole number or auto"),
        ("accelerator", "tpu", "one of auto, cpu, gpu, cuda, mps; did you mean gpu?"),
        ("global_batch_size", "big", "a whole number or null"),
        ("precision_fallback", "maybe", "true or false"),
        ("agreement_timeout", "long", "a number"),
        ("runs_dir", 3, "text"),
        ("wandb.tags", "one", "a list; write [one]"),
        ("trainer.gradient_clip_algorithm", "both", "one of norm, value or null"),
        ("trainer.callbacks", ["pkg.Callback"], "a list, a mapping or null"),
        ("model", [1], "a mapping or null"),
    ],
)
def test_a_wrong_type_is_reported_with_the_given_and_the_expected_value(path: str, value: Any, expected: str) -> None:
    assert only_problem(path, value) == Problem(path, f"given {value!r}; expected {expected}")


@pytest.mark.parametrize("path", ["seed", "resume", "runs_dir", "devices", "agreement_timeout"])
def test_null_is_rejected_if_a_value_is_required(path: str) -> None:
    assert only_problem(path, None).message.startswith("given None; expected ")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_timeout_is_a_finite_number(number: float) -> None:
    assert only_problem("agreement_timeout", number).message.startswith(f"given {number}; ")


@pytest.mark.parametrize("path", WITH_MINIMUM)
def test_the_smallest_number_is_accepted_and_the_next_below_is_not(path: str) -> None:
    minimum = LEAVES[path].minimum
    assert minimum is not None
    smallest = int(minimum)

    assert find_problems(nested(path, smallest)) == []
    assert only_problem(path, smallest - 1).message == f"given {smallest - 1}; expected at least {smallest}"


@pytest.mark.parametrize("share", [0, 0.0, -0.5, 1.01, 92, float("nan"), float("inf"), "1.5"])
def test_an_invalid_share_of_memory_is_rejected(share: Any) -> None:
    message = f"given {share!r}; expected a share of each device's memory, more than 0 and at most 1, as in 0.92"
    assert only_problem("memory_share", share) == Problem("memory_share", message)


@pytest.mark.parametrize("share", [1, 1.0, 0.92, 1e-9])
def test_a_share_of_memory_up_to_all_of_it_is_accepted(share: float) -> None:
    assert parse_config({"memory_share": share}).memory_share == share


@pytest.mark.parametrize("path", ["devices", "num_nodes", "global_batch_size", "trainer.accumulate_grad_batches"])
@pytest.mark.parametrize("size", [0, -1, -64])
def test_a_size_of_zero_or_less_is_rejected(path: str, size: int) -> None:
    assert only_problem(path, size) == Problem(path, f"given {size}; expected at least 1")


@pytest.mark.parametrize("name", ["a/b", "../x", "..", ".hidden", "a b", "$(x)", "", "n" * 101, "übung", "a\n", "-rf"])
def test_a_name_unfit_for_a_folder_or_job_is_rejected(name: str) -> None:
    assert only_problem("name", name).message.startswith(f"given {name!r}; expected up to 100 letters")


@pytest.mark.parametrize("name", ["a", "n" * 100, "run-1_b.2", "7"])
def test_a_plain_name_is_accepted(name: str) -> None:
    assert parse_config({"name": name}).name == name


@pytest.mark.parametrize("precision", ["auto", "bf16", "16-mixed", 32, "fp32"])
def test_every_spelling_of_a_precision_is_accepted(precision: str | int) -> None:
    assert parse_config({"precision": precision}).precision == precision


def test_an_unknown_precision_lists_the_valid_ones_and_the_nearest() -> None:
    message = only_problem("precision", "bf61-mixed").message
    assert "bf16-mixed" in message
    assert message.endswith("; or auto")


def test_an_unknown_strategy_lists_the_valid_ones() -> None:
    assert only_problem("strategy", "dpp").message == (
        "given 'dpp'; expected one of auto, single_device, ddp, ddp_find_unused_parameters_true, fsdp2, "
        "fsdp2_grad_op, hsdp, deepspeed_stage_1, deepspeed_stage_2, deepspeed_stage_3, fsdp2_offload, "
        "deepspeed_stage_2_offload, deepspeed_stage_3_offload, deepspeed_stage_3_offload_nvme; did you mean ddp?"
    )


def _misspell(name: str) -> list[str]:
    """The name with two letters exchanged, without its last letter, and with another one more."""
    return [f"{name[0]}{name[2]}{name[1]}{name[3:]}", name[:-1], f"{name}x"]


CHOICES = {path: [name for part in (info.hint, *typing.get_args(info.hint)) if typing.get_origin(part) is Literal
                  for name in typing.get_args(part)] for path, info in config_fields()}  # fmt: skip
CHOICES = {**{path: names for path, names in CHOICES.items() if names}, "strategy": [*list_strategy_names()],
           "trainer.profiler": ["simple", "advanced", "pytorch", "xla"], "precision": [*Precision]}  # fmt: skip


@pytest.mark.parametrize("path", CHOICES)
def test_a_misspelt_choice_is_recognized(path: str) -> None:
    for name in CHOICES[path]:
        for typed in _misspell(name):
            if typed in CHOICES[path]:
                continue
            message = only_problem(path, typed).message
            suggested = re.search(r"did you mean (\S+)\?|nearest is '(\S+)'", message)
            longer = [each for each in CHOICES[path] if each.startswith(typed)]
            # Several names are equally likely, as after `deepspeed_stage_`.
            assert suggested is not None or len(longer) > 1, message
            assert suggested is None or (suggested[1] or suggested[2]) in CHOICES[path]


@pytest.mark.parametrize("typed", ["quantum", "", "3"])
def test_a_value_that_is_like_no_choice_gets_no_suggestion(typed: str) -> None:
    assert "did you mean" not in only_problem("wandb.mode", typed).message


def test_an_empty_group_keeps_its_defaults() -> None:
    assert parse_config({"trainer": None, "wandb": {}, "checkpoint": None}) == RunConfig()


def test_the_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted(LEAVES))
def test_the_digest_changes_with_each_field(path: str) -> None:
    config = RunConfig()
    assert changed(config, path, "another value").digest() != config.digest()


def test_equal_configs_have_one_digest_whatever_the_order_of_their_keys() -> None:
    one = parse_config({"seed": 3, "model": {"class_path": "a.B", "init_args": {"x": 1, "y": 2}}})
    two = parse_config({"model": {"init_args": {"y": 2, "x": 1}, "class_path": "a.B"}, "seed": 3})
    assert one.digest() == two.digest()
    assert len(one.digest()) == 64


def test_a_mapping_with_keys_of_several_types_has_a_digest_whatever_their_order() -> None:
    def digest(values: dict[Any, str]) -> str:
        return parse_config({"model": {"class_path": "a.B", "init_args": {"names": values}}}).digest()

    assert digest({1: "a", "x": "b"}) == digest({"x": "b", 1: "a"})
    assert digest({1: "a", "x": "b"}) != digest({1: "b", "x": "a"})


_TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=5,
)
_CONFIGS = st.builds(
    RunConfig,
    seed=st.integers(0, 2**32),
    devices=st.integers(1, 8) | st.just("auto"),
    use_amp=st.none() | st.booleans(),
    precision=st.sampled_from(["auto", 16, "bf16-mixed"]),
    process_group_timeout=st.floats(1, 1e6),
    model=st.none()
    | st.fixed_dictionaries({"class_path": st.just("a.B"), "init_args": st.dictionaries(_TEXT, _PLAIN)}),
)


@settings(max_examples=5, deadline=None)
@given(_CONFIGS)
def test_a_config_written_as_yaml_reads_back_equal(config: RunConfig) -> None:
    again = parse_config(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert again.digest() == config.digest()


def test_only_one_interval_between_checkpoints_is_accepted() -> None:
    assert find_problems({"checkpoint": {"every": "auto", "every_n_steps": None}}) == []
    (problem,) = find_problems({"checkpoint": {"every": "auto", "every_n_steps": 5}})
    assert problem == Problem(
        "checkpoint.every",
        "given checkpoint.every and checkpoint.every_n_steps; expected one of them, remove the other",
    )
    (problem,) = find_problems({"checkpoint": {"async": True}})
    assert "checkpoint.background" in problem.message
