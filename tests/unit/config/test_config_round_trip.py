"""Any config that is accepted can be written and read again, and no object of the user's is made on the way."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.config.loading import load_config
from launcher.config.schema import config_fields
from launcher.config.validation import parse_config
from launcher.core.errors import ConfigError
from launcher.core.yaml_loader import Loader, dump_yaml
from launcher.user_code.classes import import_classes
from tests.support import cli_zoo

_ZOO = "tests.support.cli_zoo"
_ENCODER = st.fixed_dictionaries(
    {"class_path": st.sampled_from([f"{_ZOO}.ZooEncoder", f"{_ZOO}.DeepZooEncoder", "ZooEncoder"])},
    optional={
        "init_args": st.fixed_dictionaries({}, optional={"width": st.integers(1, 9), "act": st.just("torch.nn.GELU")})
    },
)
_OPTIMIZER = st.fixed_dictionaries(
    {"class_path": st.sampled_from(["torch.optim.SGD", "torch.optim.Adam"])},
    optional={"init_args": st.fixed_dictionaries({}, optional={"lr": st.floats(0.125, 1.0)})},
)
_NET_ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "width": st.integers(1, 9),
        "lr": st.sampled_from([0.5, 1e-4, 1]),
        "name": st.sampled_from(["a", "1e-4", "2024-01-02", "true", "ü: x"]),
        "flag": st.booleans(),
        "sizes": st.lists(st.integers(0, 3), max_size=3),
        "weights": st.dictionaries(st.sampled_from("ab"), st.floats(0.125, 1.0), max_size=2),
        "mode": st.sampled_from(["FAST", "SLOW"]),
        "shape": st.fixed_dictionaries({"width": st.integers(1, 9)}),
        "encoder": _ENCODER,
        "blocks": st.lists(_ENCODER, max_size=2),
        "optimizer": _OPTIMIZER,
        "untyped": st.dictionaries(st.integers(0, 3) | st.sampled_from("xy"), _ENCODER | st.integers(), max_size=2),
    },
)
_CONFIGS = st.fixed_dictionaries(
    {"model": st.fixed_dictionaries({"class_path": st.just(f"{_ZOO}.Net"), "init_args": _NET_ARGUMENTS})},
    optional={
        "data": st.fixed_dictionaries(
            {"class_path": st.just(f"{_ZOO}.Data")},
            optional={"init_args": st.fixed_dictionaries({"batch_size": st.integers(1, 9)})},
        ),
        "seed": st.integers(0, 9),
        "devices": st.sampled_from([1, 2, "auto"]),
        "use_amp": st.booleans(),
        "memory_share": st.floats(0.125, 1.0),
        "slurm": st.fixed_dictionaries({}, optional={"nodes": st.integers(1, 4), "mem": st.sampled_from([64, "64G"])}),
        "optimizer": _OPTIMIZER,
        "trainer": st.fixed_dictionaries(
            {},
            optional={
                "max_epochs": st.integers(0, 9),
                "limit_train_batches": st.sampled_from([2, 0.5]),
                "gradient_clip_val": st.floats(0.125, 1.0),
                "deterministic": st.sampled_from([True, "warn"]),
                "max_time": st.sampled_from(["00:01:00:00", {"days": 1}]),
                "callbacks": st.lists(
                    st.fixed_dictionaries(
                        {"class_path": st.just(f"{_ZOO}.Own")},
                        optional={"init_args": st.fixed_dictionaries({"every": st.integers(1, 9), "part": _ENCODER})},
                    ),
                    max_size=2,
                ),
            },
        ),
    },
)


def _quoted(value: Any, choose: Any) -> Any:
    """The same with some numbers and booleans in quotes, where their type determines the value."""
    if isinstance(value, dict):
        return {k: v if k in ("untyped", "mem", "class_path", "name") else _quoted(v, choose) for k, v in value.items()}
    if isinstance(value, list):
        return [_quoted(each, choose) for each in value]
    return json.dumps(value) if isinstance(value, bool | int | float) and choose(st.booleans()) else value


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(_CONFIGS, st.data())
def test_an_accepted_config_is_read_back_equal_and_no_object_is_created(
    tmp_path: Path, values: dict[str, Any], data: st.DataObject
) -> None:
    file, written = tmp_path / "given.yaml", tmp_path / "written.yaml"
    quoted = _quoted(values, data.draw)
    file.write_text(dump_yaml(quoted))
    cli_zoo.MADE.clear()

    config = load_config([file])
    classes = import_classes(config)
    written.write_text(config.to_yaml())
    again = load_config([written])

    assert again == config
    assert again.digest() == config.digest()
    assert import_classes(again) == classes
    assert cli_zoo.MADE == []
    written.write_text(dump_yaml(values))
    plain = load_config([written])
    assert import_classes(plain) == classes
    assert _without_classes(config.to_dict()) == _without_classes(plain.to_dict()), "quotes change nothing"


def _without_classes(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is kept as it was given until the class is made."""
    trainer = {**values["trainer"], "callbacks": None}
    return {**values, "model": None, "data": None, "optimizer": None, "trainer": trainer}


@pytest.mark.parametrize(
    ("path", "given", "read"),
    [
        ("seed", "1", 1),
        ("devices", "2", 2),
        ("trainer.max_epochs", "3", 3),
        ("trainer.gradient_clip_val", "0.5", 0.5),
        ("trainer.limit_train_batches", "2", 2),
        ("trainer.benchmark", "true", True),
        ("trainer.max_time", {"days": "1"}, {"days": 1}),
        ("memory_share", "0.5", 0.5),
        ("slurm.nodes", "2", 2),
        ("wandb.tags", ["1"], ["1"]),
    ],
)
def test_a_quoted_number_is_converted_and_class_specs_are_not(path: str, given: Any, read: Any) -> None:
    nested = {"class_path": f"{_ZOO}.ZooEncoder", "init_args": {"width": 16}}
    model = {"class_path": f"{_ZOO}.Net", "init_args": {"encoder": nested, "untyped": [nested]}}
    values: dict[str, Any] = {"model": model, "trainer": {"callbacks": [{**nested}]}}
    group, _, key = path.rpartition(".")
    place = values.setdefault(group, {}) if group else values
    place[key] = given
    cli_zoo.MADE.clear()

    config = parse_config(values)

    owner = getattr(config, group) if group else config
    assert getattr(owner, key) == read
    assert type(getattr(owner, key)) is type(read)
    assert (config.model, config.trainer.callbacks, cli_zoo.MADE) == (model, [nested], [])


def test_every_field_is_read_by_its_own_type() -> None:
    """A field whose type jsonargparse reads must not hold a class: it would make an object of it."""
    for path, info in config_fields():
        value = {"class_path": f"{_ZOO}.ZooEncoder"}
        nested: Any = value
        for key in reversed(path.split(".")):
            nested = {key: nested}
        cli_zoo.MADE.clear()
        with contextlib.suppress(ConfigError):
            parse_config(nested)
        assert cli_zoo.MADE == [], (path, info)


@pytest.mark.parametrize(
    "value",
    [{0: "cat", 1: "dog"}, {True: 1}, {None: 2}, {1.5: [1, {"a": None}]}, [["x"], [], {}], "2024-01-02", 1e-9, "1e-9"],
)
def test_yaml_keeps_the_keys_and_values_of_an_argument(value: Any) -> None:
    assert yaml.load(dump_yaml({"it": value}), Loader) == {"it": value}  # noqa: S506 -- a SafeLoader
