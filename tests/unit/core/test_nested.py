"""Nested mappings by dotted path."""

from __future__ import annotations

from launcher.core.nested import flatten


def test_nested_mappings_become_dotted_paths_in_order() -> None:
    assert list(flatten({"b": {"y": 1, "x": {"z": None}}, "a": [{"k": 1}]}).items()) == [
        ("b.y", 1),
        ("b.x.z", None),
        ("a", [{"k": 1}]),
    ]


def test_an_empty_mapping_stays_a_value() -> None:
    assert flatten({"model": {}, "data": {"args": {}}}) == {"model": {}, "data.args": {}}


def test_only_groups_are_flattened() -> None:
    values = {"model": {"init_args": {"lr": 1}}, "trainer": {"max_steps": 3}}
    assert flatten(values, {"model", "trainer"}.__contains__) == {"model.init_args": {"lr": 1}, "trainer.max_steps": 3}
