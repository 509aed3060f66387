"""Folders of torch's distributed checkpoints: refused when damaged, no code in them runs, converted both ways."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from launcher.checkpoint.formats import format_of
from launcher.checkpoint.manifest import newest_valid, write_manifest
from launcher.checkpoint.read_back import ReadBack
from launcher.checkpoint.reader import Trust
from launcher.checkpoint.resume import check_checkpoint
from launcher.checkpoint.sharded import read_sharded, write_sharded
from launcher.core.errors import ResumeError
from launcher.training.resume.convert import convert_checkpoint
from strategies.sharded_metadata import META, METADATA

PART = "__0_0.distcp"


class RunsCode:
    """Its pickle creates a folder when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def content(**more: Any) -> dict[str, Any]:
    """What Lightning saves for a model with tied weights and two groups of parameters, one of which is empty."""
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3), "note": "kept"}
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}, {"lr": 0.2, "params": []}]
    return {"state_dict": {"a.weight": weight, "b.weight": weight, "count": torch.tensor(7)},
            "optimizer_states": [{"state": {0: state}, "param_groups": groups}], "lr_schedulers": [{"last_epoch": 3}],
            "loops": {}, "global_step": 3, "epoch": 1,
            "launcher": {"precision": "32-true", "strategy": "fsdp2", "world_size": 4}, **more}  # fmt: skip


def write(path: Path, **more: Any) -> Path:
    write_sharded(content(**more), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "last.ckpt")


def test_the_content_is_read_as_it_was_written(folder: Path) -> None:
    check_checkpoint(folder)
    found, expected = read_sharded(folder), content()
    state, saved = found["optimizer_states"][0], expected["optimizer_states"][0]
    assert state["param_groups"] == saved["param_groups"]
    assert torch.equal(state["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])
    assert [state["state"][0][key] for key in ("step", "note")] == [torch.tensor(3.0), "kept"]
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    assert all(torch.equal(found["state_dict"][name], value) for name, value in expected["state_dict"].items())
    assert {key: found[key] for key in ("loops", "global_step", "lr_schedulers")} == {
        key: expected[key] for key in ("loops", "global_step", "lr_schedulers")
    }


def test_a_list_that_contains_itself_is_saved(tmp_path: Path) -> None:
    around: list[Any] = [1]
    around.append(around)
    found = read_sharded(write(tmp_path / "last.ckpt", callbacks={"Mine": around}))["callbacks"]["Mine"]
    assert found[0] == 1
    assert found[1] is found


def test_the_description_names_strategy_and_ranks(folder: Path, tmp_path: Path) -> None:
    assert format_of(folder).describe(folder) == "fsdp2 on 4 ranks"
    one = write(tmp_path / "one", launcher={"strategy": "hsdp", "world_size": 1})
    assert format_of(one).describe(one) == "hsdp on 1 rank"
    for number, record in enumerate((None, 3, {"strategy": 3}, {"strategy": "fsdp2", "world_size": "many"})):
        other = write(tmp_path / f"other-{number}", launcher=record)
        assert format_of(other).describe(other) == "another program as a sharded checkpoint"


def test_a_checkpoint_of_weights_only_cannot_continue_a_training(tmp_path: Path) -> None:
    weights = {key: value for key, value in content().items() if key not in ("optimizer_states", "lr_schedulers")}
    write_sharded(weights, tmp_path / "weights.ckpt")
    with pytest.raises(ResumeError, match="it lacks optimizer_states"):
        check_checkpoint(tmp_path / "weights.ckpt")
    assert "optimizer_states" not in read_sharded(tmp_path / "weights.ckpt")


def change_metadata(folder: Path, change: Callable[[Metadata], Any]) -> None:
    metadata = pickle.loads((folder / METADATA).read_bytes())  # noqa: S301 -- of this test
    changed = change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata if changed is None else changed))


def shorten(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _place(metadata: Metadata, **values: Any) -> None:
    vars(next(iter(metadata.storage_data.values()))).update(values)


def _entry(metadata: Metadata) -> TensorStorageMetadata:
    found = metadata.state_dict_metadata["state_dict.a.weight"]
    assert isinstance(found, TensorStorageMetadata)
    return found


def _enlarge(metadata: Metadata) -> None:
    vars(_entry(metadata).chunks[0]).update(sizes=torch.Size([1 << 40, 3]))


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no metadata": (lambda f: (f / METADATA).unlink(), r"\.metadata is missing"),
    "no meta": (lambda f: (f / META).unlink(), "meta.pt is missing"),
    "no part": (lambda f: (f / PART).unlink(), "__0_0.distcp is missing"),
    "a short part": (lambda f: shorten(f / PART, 100), "__0_0.distcp has 100 bytes of"),
    "an empty part": (lambda f: shorten(f / PART, 0), "__0_0.distcp has 0 bytes of"),
    "half of the metadata": (lambda f: shorten(f / METADATA, 200), r"\.metadata cannot be read"),
    "empty metadata": (lambda f: shorten(f / METADATA, 0), r"\.metadata cannot be read"),
    "half of meta": (lambda f: shorten(f / META, 200), "is damaged"),
    "a link to a part": (lambda f: _link(f / PART), "__0_0.distcp is a link"),
    "a link to the metadata": (lambda f: _link(f / METADATA), r"\.metadata is a link"),
    "a link to meta": (lambda f: _link(f / META), "meta.pt is a link"),
    "a file outside": (lambda f: change_metadata(f, lambda m: _place(m, relative_path="../x")), "not the name of"),
    "an absolute path": (lambda f: change_metadata(f, lambda m: _place(m, relative_path="/x")), "not the name of"),
    "a negative place": (lambda f: change_metadata(f, lambda m: _place(m, offset=-1)), "bytes at -1"),
    "a place behind the end": (lambda f: change_metadata(f, lambda m: _place(m, offset=1 << 40)), "has .* bytes of"),
    "a compressed part": (lambda f: change_metadata(f, lambda m: _place(m, transform_descriptors=["x"])), "compressed"),
    "a huge tensor": (lambda f: change_metadata(f, lambda m: setattr(_entry(m), "size", torch.Size([1 << 40, 3]))),
                      "a.weight has 6 of"),
    "a flat shape": (lambda f: change_metadata(f, lambda m: setattr(_entry(m), "size", torch.Size([6]))),
                     "a part of shape"),
    "a huge chunk": (lambda f: change_metadata(f, _enlarge),
                     "bytes for"),
    "no chunk": (lambda f: change_metadata(f, lambda m: _entry(m).chunks.clear()), "a.weight has 0 of 6 elements"),
    "no places": (lambda f: change_metadata(f, lambda m: m.storage_data.clear()), "lacks its part|is in no file"),
    "no paths": (lambda f: change_metadata(f, lambda m: m.planner_data.clear()), "has no path"),
    "numbers as names": (lambda f: change_metadata(f, lambda m: m.planner_data.update({3: ("x",)})), "a name is a int"),
    "another object": (lambda f: change_metadata(f, lambda m: {"a": 1}), "dict in place of a Metadata"),
    "a list as a size": (lambda f: change_metadata(f, lambda m: setattr(_entry(m), "size", [2, 3])), "size is a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_one_error_that_names_the_file(folder: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(folder)
    for read in (check_checkpoint, read_sharded, lambda path: convert_checkpoint(path, folder.parent / "out")):
        with pytest.raises(ResumeError, match=message) as caught:
            read(folder)
        assert str(folder) in str(caught.value)
        assert "give another checkpoint" in str(caught.value)
    assert not (folder.parent / "out").exists()


def test_a_part_with_other_bytes_is_one_error(folder: Path) -> None:
    (folder / PART).write_bytes(os.urandom((folder / PART).stat().st_size))
    check_checkpoint(folder)
    with pytest.raises(ResumeError, match=r"is damaged|is not a checkpoint"):
        read_sharded(folder)


class TestCode:
    """Each file of a folder that another user may have written."""

    def test_metadata(self, folder: Path, tmp_path: Path) -> None:
        for made in (RunsCode(tmp_path / "mark"), {"x": RunsCode(tmp_path / "mark")}):
            (folder / METADATA).write_bytes(pickle.dumps(made))
            with pytest.raises(ResumeError, match=r"\.metadata cannot be read: it names posix.mkdir"):
                check_checkpoint(folder)
        assert not (tmp_path / "mark").exists()

    def test_metadata_cannot_change_a_class(self, folder: Path) -> None:
        # The state of a class would be its attributes, for this process.
        module, name = "torch.distributed.checkpoint.metadata", "Metadata"
        state = pickle.dumps((None, {"version": "changed"}), protocol=0)[:-1]
        (folder / METADATA).write_bytes(f"c{module}\n{name}\n".encode() + state + b"b.")
        with pytest.raises(ResumeError, match=r"\.metadata cannot be read"):
            check_checkpoint(folder)
        assert Metadata.version is None

    @pytest.mark.parametrize("named", ["getattr", "eval", "__import__"])
    def test_metadata_cannot_call_builtins(self, folder: Path, named: str) -> None:
        (folder / METADATA).write_bytes(f"cbuiltins\n{named}\n(Vos\nVsystem\ntR.".encode())
        with pytest.raises(ResumeError, match=r"\.metadata cannot be read"):
            check_checkpoint(folder)

    def test_a_value(self, folder: Path, tmp_path: Path) -> None:
        mark = tmp_path / "mark"
        self.replace_value(folder, "optimizer_0.param_groups.0.lr", RunsCode(mark))
        check_checkpoint(folder)
        with pytest.raises(ResumeError, match=r"objects whose loading would run code: .*posix.mkdir"):
            read_sharded(folder, Trust())
        convert_checkpoint(folder, tmp_path / "weights.pt")
        with pytest.raises(ResumeError, match="would run code"):
            convert_checkpoint(folder, tmp_path / "all.ckpt", "lightning")
        assert not mark.exists()
        read_sharded(folder, Trust(everywhere=True))
        assert mark.exists(), "the object is one that runs code"

    def test_a_tensor(self, folder: Path, tmp_path: Path) -> None:
        self.replace_value(folder, "state_dict.a.weight", RunsCode(tmp_path / "mark"))
        with pytest.raises(ResumeError, match="would run code"):
            read_sharded(folder, Trust())
        assert not (tmp_path / "mark").exists()

    def test_meta(self, tmp_path: Path) -> None:
        mark = tmp_path / "mark"
        check_checkpoint(write(tmp_path / "model.ckpt", hyper_parameters=RunsCode(mark)), Trust())
        path = write(tmp_path / "state.ckpt", callbacks={"Mine": RunsCode(mark)})
        with pytest.raises(ResumeError, match=r"would run code: callbacks.Mine \(posix.mkdir\)"):
            check_checkpoint(path, Trust())
        assert not mark.exists()
        read_sharded(path, Trust(everywhere=True))
        assert mark.exists()

    @staticmethod
    def replace_value(folder: Path, name: str, value: Any) -> None:
        """Put another value behind the others, and let the metadata refer to it."""
        buffer = io.BytesIO()
        torch.save(value, buffer)
        start = (folder / PART).stat().st_size
        with (folder / PART).open("ab") as file:
            file.write(buffer.getvalue())

        def change(metadata: Metadata) -> None:
            for index, place in metadata.storage_data.items():
                if index.fqn == name:
                    vars(place).update(offset=start, length=len(buffer.getvalue()))

        change_metadata(folder, change)


def test_metadata_of_an_earlier_python_are_read(folder: Path) -> None:
    """Its enums are attributes, which `getattr` reads."""
    data = (folder / METADATA).read_bytes()
    assert b"_MEM_FORMAT_ENCODING" in data

    class Older(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if type(obj).__name__ == "_MEM_FORMAT_ENCODING":
                return getattr, (type(obj), obj.name)
            return NotImplemented

    buffer = io.BytesIO()
    Older(buffer).dump(pickle.loads(data))  # noqa: S301 -- of this test
    (folder / METADATA).write_bytes(buffer.getvalue())
    assert torch.equal(read_sharded(folder)["state_dict"]["a.weight"], content()["state_dict"]["a.weight"])


def test_read_back_reports_a_folder_that_no_resume_can_use(folder: Path) -> None:
    notices: list[str] = []
    ReadBack(Trust(), notices.append)(folder, folder.parent / "one" / "last.ckpt")
    assert notices == []
    shorten(folder / PART, 100)
    ReadBack(Trust(), notices.append)(folder, folder.parent / "one" / "last.ckpt")
    (text,) = notices
    assert "cannot be read back" in text
    assert "__0_0.distcp has 100 bytes of" in text


def test_the_newest_valid_checkpoint_is_found_by_the_hashes(tmp_path: Path) -> None:
    for name in ("step=3.ckpt", "last.ckpt"):
        write_manifest(write(tmp_path / name), tmp_path / name, 3)
    assert newest_valid(tmp_path, "last.ckpt")[0] == tmp_path / "last.ckpt"
    part = tmp_path / "last.ckpt" / PART
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    found, skipped = newest_valid(tmp_path, "last.ckpt")
    assert found == tmp_path / "step=3.ckpt"
    assert f"{PART} in it has changed" in skipped[tmp_path / "last.ckpt"]


class TestConvert:
    def test_each_format(self, folder: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        expected = content()["state_dict"]
        for kind in ("weights", "safetensors", "lightning", "sharded"):
            assert convert_checkpoint(folder, tmp_path / kind, kind) == 3
        plain = torch.load(tmp_path / "weights", weights_only=True)
        tensors = load_file(tmp_path / "safetensors")
        whole = torch.load(tmp_path / "lightning", weights_only=True)
        again = read_sharded(tmp_path / "sharded")
        for found in (plain, tensors, whole["state_dict"], again["state_dict"]):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], value) for name, value in expected.items())
        for found in (whole, again):
            assert found["optimizer_states"][0]["param_groups"] == content()["optimizer_states"][0]["param_groups"]
            assert found["global_step"] == 3
        assert {
            (tmp_path / name).stat().st_mode & 0o077 for name in ("weights", "safetensors", "lightning", "sharded")
        } == {0}
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    def test_tied_weights_and_views_of_a_file_are_separate_tensors(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        whole = torch.arange(12.0).reshape(3, 4)
        state = {"a": whole, "tied": whole, "view": whole[1], "columns": whole.T, "text": "left out"}
        torch.save({"state_dict": state}, tmp_path / "one.ckpt")
        assert convert_checkpoint(tmp_path / "one.ckpt", tmp_path / "out.safetensors", "safetensors") == 4
        found = load_file(tmp_path / "out.safetensors")
        assert all(torch.equal(found[name], state[name]) for name in ("a", "tied", "view", "columns"))

    @pytest.mark.parametrize("kind", ["safetensors", "sharded"])
    def test_existing_files_are_kept_and_nothing_is_left_of_an_error(
        self, folder: Path, tmp_path: Path, kind: str
    ) -> None:
        (tmp_path / "taken").write_text("mine")
        with pytest.raises(ResumeError, match="exists already"):
            convert_checkpoint(folder, tmp_path / "taken", kind)
        with pytest.raises(ResumeError, match="cannot be written"):
            convert_checkpoint(folder, tmp_path / "none" / "out", kind)
        shutil.rmtree(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["taken"]
