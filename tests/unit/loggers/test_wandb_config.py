"""`build_wandb_config`: the model and its precision in the config of a W&B run."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from launcher.agreement.facts import Agreement
from launcher.config.schema import RunConfig
from launcher.loggers.wandb_config import build_wandb_config
from launcher.planning.plan import Plan, make_plan
from tests.support.rank_threads import CPU, H100, V100, facts

FIELDS = ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_length")


def plan(precision: str = "auto", *devices: Any, **traits: Any) -> Plan:
    known = [facts(n, device, traits=traits) for n, device in enumerate(devices or (CPU, CPU))]
    return make_plan(RunConfig(precision=precision, global_batch_size=16), Agreement(tuple(known)))


@pytest.mark.case(27)
def test_hyperparameters_with_amp_settings_are_in_the_config() -> None:
    given = {"use_amp": True, "precision": "16", "lr": 0.1}
    made = build_wandb_config(nn.Linear(2, 3), None, given)
    assert (made["mixed_precision"], made["precision"], made["use_amp"], made["lr"]) == (True, "16", True, 0.1)
    assert given == {"use_amp": True, "precision": "16", "lr": 0.1}, "the caller's own stay as they were"


@pytest.mark.case(27)
@pytest.mark.parametrize("given", [None, {}, {"lr": 1}])
def test_the_three_keys_exist_for_any_arguments(given: Any) -> None:
    made = build_wandb_config(nn.Linear(2, 3), None, given)
    assert (made["mixed_precision"], made["precision"], made["use_amp"]) == (False, None, False)


@pytest.mark.case(28)
@pytest.mark.parametrize(
    ("given", "planned", "expected"),
    [
        ({"use_amp": True}, None, True),
        ({"use_amp": False}, None, False),
        ({}, None, False),
        (None, None, False),
        ({"use_amp": None}, None, False),
        ({}, ("bf16-mixed", H100), True),
        ({}, ("16-mixed", V100), True),
        ({"use_amp": None}, ("16-mixed", V100), True),
        ({}, ("32", H100), False),
        ({}, ("bf16-true", H100), False),
        # The requested and the actual precision: both are in the config.
        ({"use_amp": True}, ("32", CPU), True),
        ({"use_amp": False}, ("bf16-mixed", H100), False),
    ],
)
def test_use_amp_is_the_users_or_the_plans_or_false(given: Any, planned: Any, expected: bool) -> None:
    made = build_wandb_config(nn.Linear(2, 3), None, given, None if planned is None else plan(*planned))
    assert made["use_amp"] is expected
    assert made["mixed_precision"] is expected


def test_the_plans_precision_strategy_and_batch_are_in_the_config() -> None:
    made = build_wandb_config(nn.Linear(2, 3), None, None, plan("bf16-mixed", H100, H100, batch_size=4))
    assert (made["precision"], made["strategy"], made["world_size"]) == ("bf16-mixed", "ddp", 2)
    assert made["global_batch_size"] == 16


def test_a_custom_precision_is_not_reported_as_mixed() -> None:
    made = build_wandb_config(nn.Linear(2, 3), None, None, plan("auto", CPU, precision_plugin="theirs.Own"))
    assert (made["precision"], made["mixed_precision"], made["use_amp"]) == ("custom", False, False)


def test_parameters_are_counted_and_those_that_are_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    model[0].requires_grad_(False)
    made = build_wandb_config(model, None)
    assert (made["total_parameters"], made["trainable_parameters"]) == (4 * 3 + 3 + 6, 6)


@pytest.mark.case(46)
@pytest.mark.parametrize("model", [nn.Identity(), None, object(), SimpleNamespace(parameters=3), nn.ReLU])
def test_a_model_without_parameters_has_none_to_count(model: Any) -> None:
    made = build_wandb_config(model, {})
    assert (made["total_parameters"], made["trainable_parameters"]) == (None, None)
    assert made["model_type"] == "custom"


@pytest.mark.case(46)
def test_a_model_whose_shapes_come_with_the_first_batch_has_none_to_count_yet() -> None:
    made = build_wandb_config(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), {})
    assert (made["total_parameters"], made["trainable_parameters"]) == (None, None)


@dataclass
class Settings:
    d_model: int = 8
    n_layer: int = 2
    n_head: int = 4
    block_size: int = 16


@dataclass
class Locked:
    hidden_size: int = 8
    # Cannot be copied.
    lock: Any = field(default_factory=threading.Lock)


@pytest.mark.case(46)
@pytest.mark.parametrize("config", [None, {}, object(), SimpleNamespace(lr=1), 3, "gpt", [1], Settings])
def test_a_config_without_sizes_gives_none(config: Any) -> None:
    made = build_wandb_config(nn.Identity(), config)
    expected = [None] * 5 if config is not Settings else [None, 8, 2, 4, 16]
    assert [made[name] for name in FIELDS] == expected


@pytest.mark.case(46)
def test_a_config_that_cannot_be_copied_is_read() -> None:
    assert build_wandb_config(nn.Identity(), Locked())["hidden_size"] == 8


@pytest.mark.parametrize(
    "config",
    [
        {"vocab_size": 9, "hidden_size": 8, "num_layers": 2, "num_heads": 4, "max_length": 16},
        {"vocab_size": 9, "n_embd": 8, "n_layers": 2, "n_heads": 4, "n_positions": 16},
        {"vocab_size": 9, "embed_dim": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "max_seq_len": 16},
        SimpleNamespace(vocab_size=9, d_model=8, n_layer=2, n_head=4, max_position_embeddings=16),
        # The plain name takes precedence, and null counts as missing.
        {"vocab_size": 9, "hidden_size": 8, "d_model": 7, "num_layers": None, "n_layer": 2, "n_head": 4,
         "block_size": 16},
    ],
)  # fmt: skip
def test_sizes_are_found_under_the_names_that_model_families_use(config: Any) -> None:
    made = build_wandb_config(nn.Identity(), config)
    assert [made[name] for name in FIELDS] == [9, 8, 2, 4, 16]


SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "name", ["api_key", "WANDB_API_KEY", "apikey", "hf_token", "token", "password", "aws_secret", "db_passwd",
             "credentials", "access_key", "AUTH_TOKEN"],
)  # fmt: skip
def test_what_looks_like_a_secret_is_removed(name: str) -> None:
    assert SECRET not in repr(build_wandb_config(nn.Identity(), {}, {name: SECRET}))
    assert SECRET not in repr(build_wandb_config(nn.Identity(), {}, {"optimizer": [{"deep": {name: SECRET}}]}))


def test_what_only_resembles_a_secret_is_kept() -> None:
    given = {"tokens_per_batch": 4096, "max_tokens": 10, "pad_token_id": 0, "tokenizer": "bpe", "secretary": "s"}
    made = build_wandb_config(nn.Identity(), {}, {**given, "optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}})
    assert given.items() <= made.items()
    assert made["optimizer"] == {"lr": 0.1, "betas": [0.9, 0.95]}


def test_the_launchers_keys_override_hyperparameters_of_the_same_name() -> None:
    made = build_wandb_config(nn.Linear(2, 3), None, {"total_parameters": 0, "model_type": "gpt"})
    assert (made["total_parameters"], made["model_type"]) == (9, "custom")
