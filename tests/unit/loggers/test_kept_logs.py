"""Which folder each logger writes to, and how a CSV file is continued."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.distributed import HashStore

from launcher.hardware.topology import Topology
from launcher.loggers.kept_logs import KEY, LogFileState, LogLocation, choose_locations
from launcher.runs.directory import RunDirectory


class Mine(CSVLogger):
    pass


def run_in(folder: Path, *, is_new: bool) -> RunDirectory:
    return RunDirectory(folder, None, "abcd1234", is_new)


def keep(
    folder: Path, *loggers: Any, new: bool = False, checkpoint: Any = None, rank: int = 0, store: Any = None
) -> Any:
    size = 1 if store is None else 2
    topology = Topology(rank, size, rank, size, 0, "node", "single")
    return LogFileState(loggers, run_in(folder, is_new=new), topology, store, 1, checkpoint)


def saved(state: Any, step: int) -> dict[str, Any]:
    progress = SimpleNamespace(current=SimpleNamespace(ready=step, completed=step))
    loop = SimpleNamespace(batch_progress=progress, _batches_that_stepped=step, _should_accumulate=bool)
    trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=loop), validating=False)
    checkpoint: dict[str, Any] = {}
    state.on_save_checkpoint(trainer, None, checkpoint)
    return checkpoint[KEY]


def test_each_logger_continues_in_its_own_folder(tmp_path: Path) -> None:
    def made() -> list[Any]:
        return [CSVLogger(tmp_path), Mine(tmp_path), TensorBoardLogger(tmp_path), CSVLogger(tmp_path, "x", version="a")]

    first = choose_locations(made(), [])
    assert [location.version for location in first] == [0, 1, 2, "a"], "as Lightning numbers them one after the other"
    (tmp_path / "lightning_logs" / "version_7").mkdir(parents=True)
    assert choose_locations(made(), first) == first
    assert choose_locations(made()[::-1], first) == first[::-1]
    assert choose_locations([CSVLogger(tmp_path, version=3)], first)[0].version == 3, "the user's own number"
    assert [location.version for location in choose_locations([Mine(tmp_path / "other"), Mine(tmp_path)], first)] == [
        0,
        1,
    ]
    assert choose_locations([CSVLogger(tmp_path, "new")], first)[0].version == 0


def test_rank_zero_chooses_for_all(tmp_path: Path) -> None:
    store = HashStore()
    keep(tmp_path, zeros := CSVLogger(tmp_path), new=True, store=store)
    (tmp_path / "lightning_logs" / "version_5").mkdir(parents=True)
    keep(tmp_path, ones := CSVLogger(tmp_path), new=True, store=store, rank=1)
    assert zeros.version == ones.version == 0


@pytest.mark.parametrize("version", [None, "mine"])
def test_repeated_rows_are_removed_and_the_others_kept(tmp_path: Path, version: str | None) -> None:
    def logger() -> CSVLogger:
        return CSVLogger(tmp_path, version=version)

    one = logger()
    state = keep(tmp_path, one, new=True)
    one.log_metrics({"loss": 1.0}, 0)
    one.log_metrics({"loss": 2.0}, 1)
    checkpoint = saved(state, 2)
    one.log_metrics({"mean": 1.5}, 1)
    one.log_metrics({"late": 3.0}, 2)
    one.save()

    two = logger()
    keep(tmp_path, two, checkpoint=checkpoint)
    file = Path(two.log_dir) / "metrics.csv"
    assert file.read_text().split() == ["loss,mean,step", "1.0,,0", "2.0,,1", ",1.5,1"]
    two.log_metrics({"mean": 1.5}, 1)
    two.log_metrics({"loss": 3.0, "a": 1.0}, 2)
    two.save()
    assert file.read_text().split() == ["a,loss,mean,step", ",1.0,,0", ",2.0,,1", ",,1.5,1", "1.0,3.0,,2"]

    three = logger()
    keep(tmp_path, three)
    assert not file.exists(), "without a checkpoint it begins anew"
    keep(tmp_path, three, checkpoint={})


def test_a_checkpoint_without_a_record_of_rows_removes_none(tmp_path: Path) -> None:
    keep(tmp_path, one := CSVLogger(tmp_path), new=True)
    one.log_metrics({"loss": 1.0}, 0)
    one.save()
    keep(tmp_path, two := CSVLogger(tmp_path), checkpoint={})
    two.log_metrics({"loss": 2.0}, 1)
    two.save()
    assert (Path(two.log_dir) / "metrics.csv").read_text().split() == ["loss,step", "1.0,0", "2.0,1"]


def test_a_run_of_another_directory_writes_elsewhere(tmp_path: Path) -> None:
    state = keep(tmp_path, one := CSVLogger(tmp_path), new=True)
    one.log_metrics({"loss": 1.0}, 0)
    checkpoint = saved(state, 1)
    (tmp_path / "other").mkdir()
    keep(tmp_path / "other", two := CSVLogger(tmp_path), new=True, checkpoint=checkpoint)
    assert (one.version, two.version) == (0, 1)
    assert (Path(one.log_dir) / "metrics.csv").is_file()
    assert checkpoint["step"] == 1


@pytest.mark.parametrize("text", ["", "[1]", '[{"kind": "x"}]', "{}"])
def test_a_damaged_file_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "loggers.json").write_text(text)
    keep(tmp_path, CSVLogger(tmp_path))


def test_a_location_has_class_folder_and_name(tmp_path: Path) -> None:
    (location,) = choose_locations([Mine(tmp_path)], [])
    assert location == LogLocation(f"{__name__}.Mine", str(tmp_path), "lightning_logs", 0)


def test_the_row_of_an_epoch_is_in_the_file_before_the_next_epoch_begins(tmp_path: Path) -> None:
    """Its row follows the checkpoint of the epoch's end, and is not logged again after a kill."""
    state = keep(tmp_path, logger := CSVLogger(tmp_path), new=True)
    logger.log_metrics({"mean": 1.0}, 7)
    state.on_train_epoch_start(None, None)
    assert (Path(logger.log_dir) / "metrics.csv").read_text().split() == ["mean,step", "1.0,7"]


# jsonargparse passes every option of the writer to a logger that a config names.
@pytest.mark.parametrize("options", [{}, {"purge_step": None}])
def test_tensorboard_purges_repeated_steps(tmp_path: Path, options: dict[str, Any]) -> None:
    state = keep(tmp_path, first := TensorBoardLogger(tmp_path, **options), new=True)
    assert vars(first)["_kwargs"].get("purge_step") is None
    keep(tmp_path, second := TensorBoardLogger(tmp_path, **options), checkpoint=saved(state, 5))
    assert vars(second)["_kwargs"]["purge_step"] == 5
    keep(tmp_path, own := TensorBoardLogger(tmp_path, purge_step=3), checkpoint=saved(state, 5))
    assert vars(own)["_kwargs"]["purge_step"] == 3, "the user's own"


def test_tensorboard_reads_the_files_of_attempts_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    """A restart within a second: the name of the later file must not depend on the process number."""
    keep(tmp_path, first := TensorBoardLogger(tmp_path), new=True)
    written = [Path(first.log_dir) / f"events.out.tfevents.{int(time.time()):010d}.zzz.9.0"]
    written[0].parent.mkdir(parents=True)
    written[0].touch()
    for _ in range(2):
        keep(tmp_path, again := TensorBoardLogger(tmp_path))
        writer = again.experiment
        writer.close()
        (new,) = {*written[0].parent.iterdir()} - {*written}
        written.append(new)
        assert sorted(written) == written
