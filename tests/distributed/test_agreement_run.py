"""Ranks that would not train the same model are named, on every rank, before a model is built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed.runs import TOY, start_by_hand, toy_env

pytestmark = pytest.mark.slow
SETTINGS = (*TOY, "--global_batch_size", "8", "--trainer.max_epochs", "1")


def _nothing_trained(folder: Path) -> bool:
    return not list(folder.glob("trace-*")) and not list(folder.glob("runs/*/checkpoints"))


def test_ranks_with_different_configs_are_named_with_the_setting_that_differs(tmp_path: Path) -> None:
    words = [SETTINGS, (*SETTINGS, "--model.lr", "0.5")]
    zero, one = start_by_hand(words, tmp_path, toy_env(tmp_path / "trace"))

    assert (zero.code, one.code) == (2, 2)
    assert re.search(r"model\.init_args\.lr: None on rank 0 \(.+\), 0\.5 on rank 1 \(", zero.output), zero.output
    assert "Traceback" not in zero.output
    assert one.output == "", "rank zero alone speaks on the terminal"
    assert _nothing_trained(tmp_path)


def test_a_rank_whose_code_does_not_import_is_named_and_the_others_stop_at_once(tmp_path: Path) -> None:
    words = [SETTINGS, ("--model", "no.Such", *SETTINGS[2:])]
    zero, one = start_by_hand(words, tmp_path, toy_env(tmp_path / "trace"))

    assert (zero.code, one.code) == (2, 2)
    assert re.search(
        r"rank 1 \(.+\): .*model\.class_path: no\.Such does not import: ModuleNotFoundError", zero.output, re.S
    )
    assert _nothing_trained(tmp_path)


def test_a_rank_with_a_broken_config_is_named(tmp_path: Path) -> None:
    words = [SETTINGS, (*SETTINGS, "--trainer.max_epochs", "many")]
    zero, one = start_by_hand(words, tmp_path, toy_env(tmp_path / "trace"))

    assert (zero.code, one.code) == (2, 2)
    assert re.search(r"rank 1 \(.+\): the config has 1 problem:\s+trainer\.max_epochs: given 'many'", zero.output)


def test_the_same_mistake_on_every_rank_is_told_once_without_ranks(tmp_path: Path) -> None:
    words = [(*SETTINGS, "--seed", "x")] * 2
    zero, one = start_by_hand(words, tmp_path, toy_env(tmp_path / "trace"))

    assert (zero.code, one.code) == (2, 2)
    assert zero.output.startswith("error: the config has 1 problem:")
    assert one.output == ""


def test_a_rank_that_never_arrives_is_named_within_the_limit(tmp_path: Path) -> None:
    words = [(*SETTINGS, "--agreement_timeout", "8")] * 2
    outputs = start_by_hand(words, tmp_path, toy_env(tmp_path / "trace"), world_size=3)

    assert [finished.code for finished in outputs] == [2, 2]
    assert re.search(r"rank 2 \(node 0\) never arrived: rank 0 \(.+\) waited", outputs[0].output)
    assert _nothing_trained(tmp_path)
