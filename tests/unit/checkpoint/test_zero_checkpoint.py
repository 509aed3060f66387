"""DeepSpeed's checkpoints on disk: replaced atomically, refused when damaged, and no code in them runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint.deepspeed import ZeroLayout, read_consolidated, zero_layout
from launcher.checkpoint.reader import Trust
from launcher.checkpoint.resume import check_checkpoint
from launcher.core.errors import ResumeError
from launcher.training.resume.convert import convert_checkpoint
from strategies.choice import StrategyError
from strategies.deepspeed_strategy import check_optimizers
from strategies.folder_save import replace_folder

CONFIG = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}


class RunsCode:
    """Its pickle creates a folder when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def write(folder: Path, *, ranks: int = 2, pieces: int | None = None, **more: Any) -> Path:
    """A folder like DeepSpeed's of stage 2; its optimizer files are empty."""
    inside = folder / "checkpoint"
    inside.mkdir(parents=True)
    (folder / "latest").write_text("checkpoint")
    content = {"module": {"w": torch.zeros(2, 3), "b": torch.ones(4)}, "buffer_names": ["b"], "shared_params": {},
               "param_shapes": [{"w": torch.Size([2, 3])}], "frozen_param_shapes": {}, "dp_world_size": ranks,
               "ds_config": CONFIG, "loops": {}, "global_step": 7, "epoch": 1, **more}  # fmt: skip
    torch.save(content, inside / "mp_rank_00_model_states.pt")
    for rank in range(ranks if pieces is None else pieces):
        (inside / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    return folder


def test_the_outline_has_the_progress_and_the_shapes(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt")
    check_checkpoint(path)
    assert zero_layout(path) == ZeroLayout.of(CONFIG, 2)
    assert ZeroLayout.of(CONFIG, 2).dtype == "bf16"


@pytest.mark.parametrize(
    "other",
    [
        {**CONFIG, "zero_optimization": {"stage": 3}},
        {"zero_optimization": {"stage": 2}},
        {**CONFIG, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {**CONFIG, "zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    ],
)
def test_layout_depends_on_the_settings(other: dict[str, Any]) -> None:
    assert ZeroLayout.of(other, 2) != ZeroLayout.of(CONFIG, 2)
    assert ZeroLayout.of(CONFIG, 4) != ZeroLayout.of(CONFIG, 2)
    bucket = {**CONFIG, "zero_optimization": {"stage": 2, "reduce_bucket_size": 5}}
    assert ZeroLayout.of(bucket, 2) == ZeroLayout.of(CONFIG, 2)


def test_missing_files_of_a_rank_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="optimizer files of 1 ranks, but 2 saved it"):
        check_checkpoint(write(tmp_path / "last.ckpt", pieces=1))


def test_folder_that_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="is a folder, but not a DeepSpeed checkpoint"):
        check_checkpoint(tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt")
    file = path / "checkpoint" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ResumeError, match="is damaged"):
        check_checkpoint(path)


def test_no_code_in_a_checkpoint_runs(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = write(tmp_path / "model.ckpt", hyper_parameters=RunsCode(mark))
    check_checkpoint(path, Trust())
    path = write(tmp_path / "state.ckpt", callbacks={"Mine": RunsCode(mark)})
    with pytest.raises(ResumeError, match=r"would run code: callbacks.Mine \(posix.mkdir\)"):
        check_checkpoint(path, Trust())

    # In a file of a rank, which only DeepSpeed's functions open, with weights_only=False.
    path = write(tmp_path / "piece.ckpt", ranks=1)
    piece = next((path / "checkpoint").glob("*_optim_states.pt"))
    torch.save({"optimizer_state_dict": {"zero_stage": 2, "it": RunsCode(mark)}}, piece)
    with pytest.raises(ResumeError, match="contains objects whose loading would run code"):
        read_consolidated(path, Trust())
    assert not mark.exists()


def test_latest_cannot_name_a_file_outside_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "other")
    path = write(tmp_path / "last.ckpt")
    (path / "latest").write_text("../other/checkpoint")
    (tmp_path / "other" / "checkpoint" / "mp_rank_00_model_states.pt").unlink()
    assert zero_layout(path).stage == 2


class TestReplaceFolder:
    def test_new_folder_replaces_the_old_one_completely(self, tmp_path: Path) -> None:
        path, fresh = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.new"
        for text in ("one", "two"):
            fresh.mkdir()
            (fresh / "file").write_text(text)
            replace_folder(fresh, path)
            assert (path / "file").read_text() == text
            assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]

    def test_folder_replaces_a_file_of_another_strategy(self, tmp_path: Path) -> None:
        path, fresh = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.new"
        path.write_text("a file of DDP's")
        fresh.mkdir()
        replace_folder(fresh, path)
        assert path.is_dir()
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]

    def test_folder_replaces_a_link_and_keeps_what_it_refers_to(self, tmp_path: Path) -> None:
        path, fresh, kept = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.new", tmp_path / "step=2.ckpt"
        for folder in (kept, fresh):
            folder.mkdir()
        path.symlink_to(kept.name)
        replace_folder(fresh, path)
        assert path.is_dir()
        assert not path.is_symlink()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "step=2.ckpt"]

    def test_resume_between_the_renames_finds_the_old_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from launcher.runs.selection import find_last_checkpoint

        path, fresh = write(tmp_path / "last.ckpt"), tmp_path / ".last.ckpt.new"
        fresh.mkdir()
        rename = Path.rename

        def killed(self: Path, target: Path) -> Path:
            if self == fresh:
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            replace_folder(fresh, path)
        found = find_last_checkpoint(tmp_path)
        assert found is not None
        check_checkpoint(found)


def test_convert_accepts_a_file_and_does_not_overwrite(tmp_path: Path) -> None:
    source, target = tmp_path / "ddp.ckpt", tmp_path / "weights.pt"
    torch.save({"state_dict": {"w": torch.arange(3)}, "optimizer_states": []}, source)
    assert convert_checkpoint(source, target) == 1
    assert torch.load(target, weights_only=True)["w"].tolist() == [0, 1, 2]
    assert target.stat().st_mode & 0o777 == 0o600
    before = target.read_bytes()
    with pytest.raises(ResumeError, match="exists already"):
        convert_checkpoint(source, target)
    with pytest.raises(ResumeError, match="does not exist"):
        convert_checkpoint(tmp_path / "nothing", tmp_path / "new")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    with pytest.raises(ResumeError, match="has no state_dict"):
        convert_checkpoint(tmp_path / "foreign.pt", tmp_path / "new")
    assert target.read_bytes() == before
    assert not (tmp_path / "new").exists()


class TestOptimizers:
    parameters = staticmethod(lambda: [torch.nn.Parameter(torch.zeros(2, 2))])

    @pytest.mark.parametrize(
        ("kind", "why"),
        [("LBFGS", "asks for the loss again"), ("SparseAdam", "sparse"), ("Adafactor", "rows and columns"),
         ("Muon", "rows and columns")],
    )  # fmt: skip
    def test_optimizer_that_zero_cannot_use_is_refused_with_the_reason(self, kind: str, why: str) -> None:
        optimizer = getattr(torch.optim, kind)(self.parameters())
        with pytest.raises(StrategyError, match=f"cannot take {kind} of Mine.configure_optimizers: it .*{why}"):
            check_optimizers([optimizer], 0, "Mine")

    def test_subclass_of_such_an_optimizer_is_refused(self) -> None:
        class Own(torch.optim.Adafactor):
            pass

        with pytest.raises(StrategyError, match="cannot take Own"):
            check_optimizers([Own(self.parameters())], 0, "Mine")

    def test_several_or_no_optimizers_are_refused(self) -> None:
        one = torch.optim.SGD(self.parameters(), 0.1)
        with pytest.raises(StrategyError, match=r"takes one optimizer, .* returned SGD, SGD"):
            check_optimizers([one, one], 0, "Mine")
        with pytest.raises(StrategyError, match="returned none"):
            check_optimizers([], 0, "Mine")
        with pytest.raises(StrategyError, match=r"one learning rate scheduler, .* returned 2"):
            check_optimizers([one], 2, "Mine")

    @pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD", "Adagrad", "RMSprop", "NAdam"])
    def test_elementwise_optimizer_is_accepted(self, kind: str) -> None:
        check_optimizers([getattr(torch.optim, kind)(self.parameters(), lr=0.1)], 1, "Mine")
