"""What a resume reads: plain values from any checkpoint, objects that need code from the run's own directory only."""

from __future__ import annotations

import collections
import contextlib
import copy
import enum
import functools
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from launcher.checkpoint.atomic_io import AtomicCheckpointIO
from launcher.checkpoint.known_classes import NotLoaded
from launcher.checkpoint.read_back import ReadBack
from launcher.checkpoint.reader import Trust, read_file
from launcher.core.errors import ResumeError, TrainingError
from tests.support.kinds_of_objects import NEED_CODE, VALUES, Kind, State, same

UNNEEDED = (("hyper_parameters", "x"), ("datamodule_hyper_parameters", "x"), ("hparams_type",))
NEEDED = (("callbacks", "Mine{'a': 1}", "x"), ("Data", "x"), ("stats",), ("lr_schedulers", 0, "x"),
          ("optimizer_states", 0, "state", 0, "x"), ("loops", "fit_loop", "state_dict", "x"))  # fmt: skip


def placed(place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A checkpoint with a value at a path."""
    content: Any = value
    for key in reversed(place):
        content = [content] if key == 0 else {key: content}
    return {"state_dict": {"w": torch.ones(2)}, "global_step": 3, **content}


def placed_everywhere(places: tuple[tuple[Any, ...], ...], value: Any) -> dict[str, Any]:
    """A checkpoint with copies of a value at several paths of different first keys: one file in place of many."""
    assert len({place[0] for place in places}) == len(places)
    # Some Pythons cannot copy a flag without a name, which is a constant anyway.
    copied = (value if isinstance(value, enum.Enum) else copy.deepcopy(value) for _ in places)
    return {key: part for place, each in zip(places, copied, strict=True) for key, part in placed(place, each).items()}


def at(content: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        content = content[key]
    return content


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory as the launcher creates it."""
    (tmp_path / "run").mkdir(mode=0o700)
    return tmp_path / "run"


def saved(run: Path, content: Any) -> Path:
    """A checkpoint with a manifest, as a training saves it."""
    path = run / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


@pytest.mark.parametrize("kind", VALUES)
def test_plain_values_are_loaded_from_any_checkpoint(run: Path, kind: str) -> None:
    path = saved(run, placed_everywhere(UNNEEDED + NEEDED, VALUES[kind]))
    for trust in (None, Trust(), Trust(run), Trust(everywhere=True)):
        content = read_file(path, trust)
        for place in UNNEEDED + NEEDED:
            assert same(at(content, place), VALUES[kind]), (place, trust)
        assert torch.equal(content["state_dict"]["w"], torch.ones(2))


@pytest.mark.parametrize("kind", NEED_CODE)
def test_objects_that_need_code_are_created_only_with_trust(run: Path, kind: str) -> None:
    for place in NEEDED:
        path = saved(run, placed(place, NEED_CODE[kind]))
        for trust in (Trust(run), Trust(everywhere=True)):
            assert same(at(read_file(path, trust), place), NEED_CODE[kind]), place
        for trust in (Trust(), Trust(run.parent / "other")):
            with pytest.raises(ResumeError) as caught:
                read_file(path, trust)
            text = str(caught.value)
            key = re.escape(".".join(map(str, place)))
            assert re.search(rf"would run code: {key}[\w.]* \([\w.]+\)", text), text
            assert "--resume-trust" in text
        assert read_file(path, None)["global_step"] == 3


@pytest.mark.parametrize("kind", NEED_CODE)
def test_objects_that_a_fit_does_not_need_are_not_created(run: Path, kind: str) -> None:
    for place in UNNEEDED:
        path = saved(run, placed(place, NEED_CODE[kind]))
        for trust in (None, Trust(), Trust(run), Trust(everywhere=True)):
            assert "not loaded" in repr(at(read_file(path, trust), place)), (place, trust)


def test_a_shared_object_stays_one_object(run: Path) -> None:
    state, tensor = State(1, torch.ones(1)), torch.ones(2)
    path = saved(run, {"callbacks": {"a": state, "b": [state], "c": tensor}, "extra": tensor})
    content = read_file(path, Trust(run))
    assert content["callbacks"]["a"] is content["callbacks"]["b"][0]
    assert content["callbacks"]["c"] is content["extra"]


def test_not_loaded_objects_explain_themselves_and_can_be_saved(run: Path) -> None:
    place = ("hyper_parameters", "x")
    for _ in range(2):
        content = read_file(saved(run, placed(place, NEED_CODE["object"])), Trust(run))
        with pytest.raises(AttributeError, match=r"count: .*kinds_of_objects.State of the checkpoint was not loaded"):
            _ = at(content, place).count
        assert (
            repr(at(read_file(saved(run, content), Trust()), place))
            == "<tests.support.kinds_of_objects.State, not loaded>"
        )


def test_omegaconf_containers_are_loaded(run: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    given = omegaconf.OmegaConf.create({"a": 1, "b": {"c": [1, 2.5, "x"], "d": "${a}"}, "kind": Kind.SMALL})
    for place in (("hyper_parameters",), ("hyper_parameters", "x"), ("stats",)):
        path = saved(run, placed(place, given))
        for trust in (None, Trust()):
            found = at(read_file(path, trust), place)
            assert found == given
            assert found.b.d == 1


class Acts:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


class Sets:
    """Its pickle has a state that a class of the program accepts."""

    def __setstate__(self, mark: str) -> None:
        Path(mark).touch()

    def __reduce__(self) -> Any:
        return object.__new__, (Sets,), self.mark  # type: ignore[attr-defined]


def harmful(mark: Path) -> Iterator[tuple[str, Any]]:
    """Objects that create the file when `pickle` loads them."""
    touch = Acts(Path.touch, mark)
    yield "call", touch
    yield "command", Acts(os.system, f"touch {mark}")
    yield "statement", Acts(exec, f"import pathlib; pathlib.Path({str(mark)!r}).touch()")
    yield "attribute", Acts(Acts, getattr, Path(mark), "touch")
    state = Sets()
    state.mark = str(mark)  # type: ignore[attr-defined]
    yield "state", state
    yield "key", {touch: 1}
    yield "in a set", {1, touch}
    yield "in a partial", functools.partial(print, touch)
    yield "in a dict of a kind", collections.OrderedDict(a=touch)
    yield "in an array", np.array([touch], dtype=object)
    yield "for a tensor", Acts(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {mark}",), {})


def test_no_harmful_code_runs(run: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    armed = 0
    for name, thing in harmful(mark):
        unneeded = saved(run, {key: [thing] for key, *_ in UNNEEDED})
        for trust in (None, Trust(), Trust(run), Trust(everywhere=True)):
            read_file(unneeded, trust)
            assert not mark.exists(), (name, trust)
        for place in NEEDED:
            torch.save(placed(place, thing), path := tmp_path / "other.ckpt")
            read_file(path, None)
            for trust in (Trust(), Trust(run)):
                with pytest.raises(ResumeError):
                    read_file(path, trust)
            assert not mark.exists(), (name, place)
        with contextlib.suppress(Exception):  # it may raise after it has acted
            pickle.loads(pickle.dumps(thing))  # noqa: S301 -- shows that it is armed
        armed += mark.exists()
        mark.unlink(missing_ok=True)
    assert armed >= 9


def archive(path: Path, text: bytes) -> Path:
    """A file of `torch.save`'s format with a pickle that no Pickler would write."""
    torch.save({}, path.with_suffix(".empty"))
    with zipfile.ZipFile(path.with_suffix(".empty")) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, text if name.endswith("/data.pkl") else source.read(name))
    return path


def text_of(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


CRAFTED = {
    "system": b"cos\nsystem\n(" + text_of("touch MARK") + b"tR",
    "an old instance": b"(" + text_of("touch MARK") + b"ios\nsystem\n",
    "an old object": b"(cos\nsystem\n" + text_of("touch MARK") + b"o",
    "a stacked name": text_of("os") + text_of("system") + b"\x93(" + text_of("touch MARK") + b"tR",
    "state of a class": b"ctorch.nn.parameter\nParameter\n}" + text_of("__setstate__") + b"cos\nsystem\nsb",
    "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text_of("__code__") + b"K\x01s\x86b",
    "state of an enum": b"ctests.unit.kinds_of_objects\nKind\n(" + text_of("small") + b"tR}"
    + text_of("_value_") + text_of("poisoned") + b"sb",
    "a partial that is called": b"cfunctools\npartial\n(ctorch.nn.functional\nrelu\ntR(K\x01tR",
    "a function of torch.nn that is called": b"ctorch.nn.modules.module\nregister_module_forward_pre_hook\n(NtR",
    "a name through torch.nn": b"ctorch.nn.modules.module\ntorch.os.system\n(" + text_of("touch MARK") + b"tR",
    "getattr": b"cbuiltins\ngetattr\n(cos\nPathLike\n" + text_of("__doc__") + b"tR",
    "an or of other things": b"c_operator\nor_\n(K\x01K\x02tR",
    "an or of flags with something else": b"c_operator\nor_\n(ctests.unit.kinds_of_objects\nSwitch\n(K\x01tRNtR",
    "a registered extension": b"\x82\x01",
    "a foreign key of a storage": b"(" + text_of("module") + b"cos\nsystem\ntQ",
    "a number of an object": b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(" + text_of("O8") + b"\x89\x88tR"
    + text_of("x") + b"tR",
    "an array that is none": b"cnumpy._core.multiarray\n_reconstruct\n(cbuiltins\nset\n(K\x00t" + text_of("b") + b"tR",
}  # fmt: skip


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_pickle_is_refused_or_inert(tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "mark"
    # Their lengths must fit.
    end = CRAFTED[kind].replace(b"X\x0a\x00\x00\x00touch MARK", text_of(f"touch {mark}"))
    # With a second key, torch's own reader, which refuses the name, is not the only one that reads the file.
    text = b"\x80\x02}(" + text_of("extra") + end + text_of("hyper_parameters") + b"cmy\nClass\nu."
    path = archive(tmp_path / "crafted.ckpt", text)
    with pytest.raises(ResumeError):
        read_file(path, Trust())
    text = text.replace(text_of("extra"), text_of("hparams"))
    with contextlib.suppress(ResumeError):
        read_file(archive(tmp_path / "crafted.ckpt", text), Trust(tmp_path))
    assert not mark.exists()
    assert Kind.SMALL.value == "small"
    assert nn.Parameter.__setstate__ is not os.system
    assert not nn.modules.module._global_forward_pre_hooks


def test_older_formats_are_not_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    old, script = tmp_path / "old.ckpt", tmp_path / "script.ckpt"
    torch.save({"hyper_parameters": Acts(Path.touch, mark)}, old, _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), script)
    for path in (old, script):
        with pytest.raises(ResumeError, match="is not a checkpoint, or is damaged") as caught:
            read_file(path, Trust())
        assert "\x1b" not in str(caught.value)
    assert not mark.exists()


class TestTrust:
    def test_run_directory_is_trusted_only_if_private(self, run: Path) -> None:
        path = saved(run, placed(("stats",), NEED_CODE["object"]))
        trust = Trust(run)
        assert trust.objection(path) is None
        for open_one, mode in ((run, 0o755), (path.parent, 0o770), (path, 0o620)):
            before = stat.S_IMODE(open_one.stat().st_mode)
            open_one.chmod(mode)
            assert f"other users have access to {open_one} (mode {mode:o}" in str(trust.objection(path))
            open_one.chmod(before)
        assert trust.objection(path) is None

    def test_a_file_that_the_run_did_not_write_is_not_trusted(self, run: Path, tmp_path: Path) -> None:
        path = saved(run, placed(("stats",), NEED_CODE["object"]))
        other = path.with_name("other.ckpt")
        other.write_bytes(path.read_bytes())
        other.chmod(0o600)
        assert "no manifest" in str(Trust(run).objection(other))
        assert "not one of this run's own" in str(Trust(run).objection(path.parent / ".." / ".." / "x.ckpt"))
        assert "not one of this run's own" in str(Trust().objection(path))
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert "SHA-256" in str(Trust(run).objection(path))

    def test_a_link_is_not_followed(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir(mode=0o700)
        path = saved(tmp_path / "other", placed(("stats",), NEED_CODE["object"]))
        (run / "checkpoints").symlink_to(path.parent)
        assert "is a link" in str(Trust(run).objection(run / "checkpoints" / "last.ckpt"))

    def test_checkpoint_io_loads_according_to_trust(self, run: Path) -> None:
        path = saved(run, placed(("stats",), NEED_CODE["object"]))
        assert same(AtomicCheckpointIO(Trust(run)).load_checkpoint(path)["stats"], NEED_CODE["object"])
        assert same(AtomicCheckpointIO().load_checkpoint(path, weights_only=False)["stats"], NEED_CODE["object"])
        for weights_only in (None, True):
            with pytest.raises(ResumeError, match="would run code: stats"):
                AtomicCheckpointIO().load_checkpoint(path, weights_only=weights_only)


class Breaks:
    """Can be pickled, but not created again."""

    def __init__(self, needed: int) -> None:
        self.needed = needed

    def __reduce__(self) -> Any:
        return Breaks, ()


class TestReadBack:
    def reported(self, run: Path, content: Any, trust: Trust) -> list[str]:
        notices: list[str] = []
        io = AtomicCheckpointIO(trust, ReadBack(trust, notices.append))
        for _ in range(2):
            io.save_checkpoint(content, run / "checkpoints" / "last.ckpt")
        return notices

    def test_readable_checkpoint_gives_no_notice(self, run: Path) -> None:
        content = {**placed(("stats",), NEED_CODE["object"]), "hyper_parameters": {"x": Breaks(1)}}
        assert self.reported(run, content, Trust(run)) == []

    def test_unreadable_object_gives_one_notice_with_key_and_class(self, run: Path) -> None:
        (notice,) = self.reported(run, placed(("callbacks", "Mine", "x"), Breaks(1)), Trust(run))
        assert (
            "cannot be read back: callbacks.Mine.x (tests.unit.checkpoint.test_checkpoint_reader.Breaks): TypeError: "
            in notice
        )

    def test_untrusted_folder_gives_a_notice(self, run: Path) -> None:
        run.chmod(0o755)
        (notice,) = self.reported(run, placed(("stats",), NEED_CODE["object"]), Trust(run))
        assert "runs code: stats (tests.support.kinds_of_objects.State)" in notice
        assert f"needs --resume-trust, as other users have access to {run} (mode 755" in notice

    def test_each_folder_is_checked(self, run: Path, tmp_path: Path) -> None:
        notices: list[str] = []
        io = AtomicCheckpointIO(Trust(run), ReadBack(Trust(run), notices.append))
        content = placed(("stats",), NEED_CODE["object"])
        io.save_checkpoint(content, run / "checkpoints" / "last.ckpt")
        io.save_checkpoint(content, tmp_path / "mine" / "best.ckpt")
        assert ["not one of this run's own" in notice for notice in notices] == [True]


def test_unsaveable_object_is_reported_with_key_and_class(run: Path) -> None:
    content = placed(("callbacks", "Mine", "x"), [1, {"f": lambda: 3}])
    with pytest.raises(TrainingError, match=r"cannot be saved: callbacks.Mine.x.1.f \(builtins.function\): "):
        saved(run, content)
    assert not list((run / "checkpoints").iterdir())


def test_not_loaded_has_no_special_attributes() -> None:
    assert not hasattr(NotLoaded("x"), "__setstate__")
    assert not hasattr(NotLoaded("x"), "anything")
