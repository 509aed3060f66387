"""Checks whether a file is a checkpoint to resume from; no code in it runs."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from launcher.checkpoint.reader import Trust
from launcher.checkpoint.resume import check_checkpoint, check_fits_model, read_checkpoint
from launcher.core.errors import ResumeError

NEEDED = {"state_dict": {}, "loops": {}, "global_step": 2, "epoch": 0, "optimizer_states": []}


class Opens:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Lightning after two steps."""
    folder = tmp_path_factory.mktemp("real")
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 32)), batch_size=None)
    with warnings.catch_warnings():
        # Lightning's advice on workers, and its deprecation warnings with torch 2.13.
        warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec).*")
        trainer.fit(Unpacking(), loader)
    trainer.save_checkpoint(folder / "real.ckpt")
    return folder / "real.ckpt"


class Unpacking(BoringModel):
    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx)


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "some.ckpt")
    return folder / "some.ckpt"


def test_lightning_checkpoint_is_accepted_by_its_model(real: Path) -> None:
    check_checkpoint(real)
    check_fits_model(real, BoringModel())
    assert read_checkpoint(real)["global_step"] == 2


@pytest.mark.parametrize("lacking", sorted(NEEDED))
def test_error_names_the_missing_key(tmp_path: Path, lacking: str) -> None:
    file = saved(tmp_path, {key: value for key, value in NEEDED.items() if key != lacking})
    with pytest.raises(ResumeError, match=rf"{file} is not a Lightning training checkpoint: it lacks {lacking};"):
        check_checkpoint(file)


def test_plain_weights_are_refused_with_advice(tmp_path: Path) -> None:
    file = saved(tmp_path, nn.Linear(2, 2).state_dict())
    with pytest.raises(ResumeError, match=r"it lacks state_dict, loops, .*load plain weights in the model's own"):
        check_checkpoint(file)


def test_file_without_a_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"some.ckpt contains a list, not a Lightning checkpoint"):
        check_checkpoint(saved(tmp_path, [1, 2]))


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"not a checkpoint\n", b"PK\x03\x04" + b"\1" * 200, bytes(range(256)), b"\x80\x02."],
    ids=["empty", "zeros", "text", "zip-head", "all-bytes", "short-pickle"],
)
def test_error_of_damaged_bytes_names_the_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "damaged.ckpt"
    file.write_bytes(content)
    with pytest.raises(ResumeError, match=r"^resume: .*damaged\.ckpt is not a checkpoint"):
        check_checkpoint(file)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_truncated_checkpoint_is_refused(real: Path, tmp_path: Path, kept: float) -> None:
    complete = real.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(complete[: int(len(complete) * kept)])
    with pytest.raises(ResumeError, match=r"cut\.ckpt is not a checkpoint, or is damaged"):
        check_checkpoint(tmp_path / "cut.ckpt")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path, expected in (
        (tmp_path / "none.ckpt", "is not a checkpoint, or is damaged"),
        (tmp_path, "not a DeepSpeed checkpoint"),
    ):
        with pytest.raises(ResumeError, match=expected):
            check_checkpoint(path)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    file = tmp_path / "evil.ckpt"
    torch.save({**NEEDED, "hyper_parameters": Opens(ran)}, file)

    check_checkpoint(file, Trust())
    torch.save({**NEEDED, "callbacks": {"Mine": Opens(ran)}}, file)
    with pytest.raises(ResumeError, match=r"would run code: callbacks.Mine \(pathlib.Path"):
        check_checkpoint(file, Trust())

    assert not ran.exists()


def test_code_in_a_plain_pickle_is_never_run(tmp_path: Path) -> None:
    file = tmp_path / "evil.pkl"
    file.write_bytes(pickle.dumps(Opens(tmp_path / "ran")))
    with pytest.raises(ResumeError, match="is not a checkpoint"):
        check_checkpoint(file)
    assert not (tmp_path / "ran").exists()
    pickle.loads(file.read_bytes())  # noqa: S301 -- shows that the file is armed
    assert (tmp_path / "ran").exists()


class Other(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(32, width)
        self.head = nn.Linear(width, 1, bias=False)


def test_error_lists_the_differences_of_another_model(real: Path) -> None:
    with pytest.raises(ResumeError) as caught:
        check_fits_model(real, Other(3))
    text = str(caught.value)
    assert "is of another model than Other: " in text
    assert "head.weight is only in the model" in text
    assert "layer.weight is (2, 32) in the checkpoint, (3, 32) in the model" in text
    assert "layer.bias is (2,) in the checkpoint, (3,) in the model" in text


def test_many_differences_are_counted_after_the_first_five(tmp_path: Path) -> None:
    file = saved(tmp_path, {**NEEDED, "state_dict": {f"w{n}": torch.zeros(1) for n in range(7)}})
    with pytest.raises(ResumeError, match=r"w0 is only in the checkpoint; .*w4 is only in the checkpoint and 5 more\n"):
        check_fits_model(file, Other(3))


def test_lazy_layer_fits_any_shape(real: Path) -> None:
    model = Other(3)
    model.layer, model.head = nn.LazyLinear(2), nn.Identity()  # type: ignore[assignment]
    check_fits_model(real, model)


def test_model_without_strict_loading_is_not_compared(real: Path) -> None:
    model = Other(3)
    model.strict_loading = False
    check_fits_model(real, model)
