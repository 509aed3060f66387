"""States of optimizers in folders of torch's distributed checkpoints: nested ones, and none."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.core.optimizer import _MockOptimizer
from torch import nn

from launcher.checkpoint.manifest import write_manifest
from launcher.checkpoint.sharded import read_sharded, write_sharded
from launcher.core.errors import ResumeError
from launcher.training.resume.convert import convert_checkpoint
from strategies.sharded_meta import STRUCTURES
from strategies.sharded_restore import load_optimizers, optimizer_by_names

NESTED: dict[str, Any] = {
    "history": [torch.arange(3.0), torch.ones(2)],
    "some": [torch.ones(2), [], None, [torch.zeros(1)]],
    "pair": (torch.ones(1), 3, ("text", torch.zeros(2))),
    "numbered": {0: torch.ones(2), 7: {"inside": (torch.ones(1),)}},
    "named": {"one": torch.ones(1), "none": {}},
    "empty": {},
    "empty in a list": [{}, torch.ones(1), {3: []}],
    "no tuples": (),
}


def save(path: Path, states: list[Any]) -> Path:
    write_sharded({"state_dict": {"w": torch.ones(3)}, "optimizer_states": states, "lr_schedulers": []}, path)
    return path


@pytest.mark.parametrize("name", NESTED)
def test_nested_states_are_read_as_they_were_written(tmp_path: Path, name: str) -> None:
    saved = {"state": {0: {name: NESTED[name], "step": 3}, 1: {"step": 4}}, "param_groups": [{"params": [0, 1]}]}
    content = read_sharded(save(tmp_path / "last.ckpt", [saved]))
    assert STRUCTURES not in content
    (state,) = content["optimizer_states"]
    assert state["state"][1] == {"step": 4}
    assert sorted(state["state"][0]) == sorted([name, "step"])
    # Also the kinds of the containers and of the keys.
    assert repr(state["state"][0][name]) == repr(NESTED[name])


def test_a_training_without_an_optimizer_is_saved() -> None:
    """As `configure_optimizers` that returns None."""
    optimizer = _MockOptimizer()
    state = optimizer_by_names(nn.Linear(2, 2), optimizer)
    load_optimizers([optimizer], {"optimizer_states": [state]})
    assert state == optimizer.state_dict()


def test_weights_alone_are_converted_further(tmp_path: Path) -> None:
    source, plain, folder = save(tmp_path / "last.ckpt", []), tmp_path / "weights.pt", tmp_path / "folder.ckpt"
    convert_checkpoint(source, plain)
    assert convert_checkpoint(plain, tmp_path / "one.safetensors", "safetensors") == 1
    assert convert_checkpoint(plain, folder, "sharded") == 1
    assert read_sharded(folder)["state_dict"]["w"].tolist() == [1, 1, 1]
    with pytest.raises(ResumeError, match=r"convert: .*weights.pt has no state_dict; give a checkpoint"):
        convert_checkpoint(plain, tmp_path / "whole.ckpt", "lightning")


def test_a_checkpoint_that_its_manifest_does_not_match_is_not_converted(tmp_path: Path) -> None:
    source = save(tmp_path / "last.ckpt", [])
    write_manifest(source, source, 1)
    part = source / "__0_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 0xFF
    part.write_bytes(content)
    with pytest.raises(ResumeError, match=r"^convert: .* is damaged: __0_0.distcp in it has changed \(SHA-256 differs"):
        convert_checkpoint(source, tmp_path / "out")


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    empty, pickled = tmp_path / "empty.ckpt", tmp_path / "pickled.ckpt"
    empty.mkdir()
    pickled.write_bytes(pickle.dumps({"state_dict": {}}))
    for path, message in ((empty, "nor one of FSDP2: it has no .metadata"), (pickled, "not in the format that")):
        with pytest.raises(ResumeError, match=f"^convert: {path} .*{message}"):
            convert_checkpoint(path, tmp_path / "out")
