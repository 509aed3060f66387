"""`TrainingCoordinator` in scripts: one process, several ranks, and the state after a failure."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs.status import read_run_status
from tests.support import wandb_file
from tests.support.processes import Finished, found_in, run_warm
from tests.support.runs import events_of, free_port, only_run, read_trace, toy_env

pytestmark = pytest.mark.slow

HEAD = """
import json, os, sys
import torch
from launcher import TrainingCoordinator
from launcher.config.schema import WandbOptions
from launcher.core.errors import LauncherError
from tests.support.toy import Probe, Toy, ToyData

QUIET = {"enable_progress_bar": False, "enable_model_summary": False}

def coordinator(**options):
    return TrainingCoordinator(**{"output_dir": "runs", "use_gpu": False, "wandb": WandbOptions("disabled"), **options})

def found(**values):
    # One write, so that the lines of the ranks do not mix.
    sys.stdout.write(f"FOUND {json.dumps(values)}\\n")
"""


def script(folder: Path, text: str, *arguments: str, code: int = 0, env: dict[str, str] | None = None) -> Finished:
    """Run a user's script in an empty folder."""
    (folder / "train.py").write_text(HEAD + text)
    environment = {**toy_env(folder / "trace"), "PROBE": str(folder / "probe"), **(env or {})}
    return run_warm([sys.executable, "train.py", *arguments], folder, env=environment, timeout=240).check(code)


def notices_of(run_directory: Path) -> list[str]:
    return [event["message"] for event in events_of(run_directory, "notice")]


def probed(folder: Path) -> Sequence[Any]:
    return json.loads((folder / "probe").read_text())


@pytest.mark.case(18)
def test_use_amp_on_a_cpu_trains_in_32_bit_with_one_notice(tmp_path: Path) -> None:
    output = script(tmp_path, """
model = Toy()
end = coordinator(callbacks=[Probe()]).train(model, ToyData(), max_epochs=1, use_amp=True, **QUIET)
found(keys=sorted(end), precision=end["trainer"].precision, same=end["model"] is model, best=end["best_model_path"],
      metrics=end["final_metrics"], plan=end["plan"].precision, steps=end["trainer"].global_step)
""").output  # fmt: skip
    (end,) = found_in(output)
    assert end["keys"] == ["best_model_path", "final_metrics", "model", "plan", "run_directory", "trainer"]
    assert f"run directory: {only_run(tmp_path)}" in output
    assert (end["precision"], end["plan"], end["same"], end["steps"]) == ("32-true", "32-true", True, 16)
    assert Path(end["best"]).is_file()
    assert end["metrics"]["loss"] == pytest.approx(read_trace(tmp_path / "trace")[-1][2])
    assert probed(tmp_path)[:2] == ["32-true", "torch.float32"]
    assert output.count("notice: use_amp was") == 1
    assert "notice: use_amp was requested, but mixed precision is native on no rank" in output
    assert len(notices_of(only_run(tmp_path))) == 1


_OWN = """
from lightning.pytorch.plugins.precision import HalfPrecision

class Own(HalfPrecision):
    made = 0

    def __init__(self):
        super().__init__("bf16-true")
        Own.made += 1
"""


@pytest.mark.case(19)
def test_a_precision_plugin_object_is_used_and_not_duplicated(tmp_path: Path) -> None:
    output = script(tmp_path, _OWN + """
own = Own()
end = coordinator(precision="16", plugins=[own], callbacks=[Probe()]).train(Toy(), ToyData(), max_steps=2, **QUIET)
found(same=end["trainer"].precision_plugin is own, made=Own.made, plan=end["plan"].precision,
      scale=end["plan"].has_loss_scale)
""").output  # fmt: skip
    assert found_in(output) == [{"same": True, "made": 1, "plan": "custom", "scale": False}]
    assert probed(tmp_path)[:2] == ["bf16-true", "torch.bfloat16"]
    (planned,) = events_of(only_run(tmp_path), "planned")
    assert planned["plan"]["precision"] == "custom"
    assert planned["plan"]["precision_reasons"] == ["the user's own __main__.Own decides"]
    assert notices_of(only_run(tmp_path)) == [
        "precision and use_amp are not used: the user's own __main__.Own decides"
    ]  # fmt: skip


@pytest.mark.case(19)
def test_a_precision_plugin_in_a_config_file_is_used_and_not_duplicated(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(_OWN)
    output = script(tmp_path, """
from launcher import fit, load_config
import theirs

arguments = ["--model", "tests.support.toy.Toy", "--data", "tests.support.toy.ToyData", "--wandb.mode", "disabled",
         "--trainer.max_steps", "2", "--trainer.plugins", "{class_path: theirs.Own}",
         "--trainer.callbacks", "[{class_path: tests.support.toy.Probe}]"]
result = fit(load_config(overrides=arguments))
found(own=type(result.trainer.precision_plugin) is theirs.Own, made=theirs.Own.made, plan=result.plan.precision)
""").output  # fmt: skip
    assert found_in(output) == [{"own": True, "made": 1, "plan": "custom"}]
    assert probed(tmp_path)[:2] == ["bf16-true", "torch.bfloat16"]
    assert notices_of(only_run(tmp_path)) == [], "nothing else was requested"


@pytest.mark.case(20)
def test_a_config_that_wandb_rejects_is_one_warning_and_training_continues(tmp_path: Path) -> None:
    output = script(tmp_path, """
import wandb
from wandb.sdk.wandb_config import Config
before = Config.update
def update(self, values, *rest, **more):
    if "model_type" in values:  # the run's own start uses the same call
        raise wandb.Error("the service is gone")
    return before(self, values, *rest, **more)
Config.update = update

end = coordinator(wandb=WandbOptions("offline")).train(Toy(), ToyData(), max_steps=2, **QUIET)
found(steps=end["trainer"].global_step)
""").output  # fmt: skip
    assert found_in(output) == [{"steps": 2}]
    text = "W&B did not accept the model's config: Error: the service is gone"
    assert output.count(text) == 1
    assert notices_of(only_run(tmp_path)).count(text) == 1


_TWO = """
os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), "elsewhere"))
kind, name, rank = sys.argv[1:4] if len(sys.argv) > 1 else ("", "", "0")
if kind == "raise":
    import launcher.training.script_end
    # The seconds that the other rank, which stays in a collective, has to leave the training.
    launcher.training.script_end._GRACE = 1.0
trains = coordinator(precision="32", devices=2)
for each in ("refused", "first", "second"):
    here = each == name
    if each == "refused" and kind:
        continue
    model = Toy(by_rank=int(rank), raise_at=3 if here and kind == "raise" else -1)
    if here and kind == "leave" and os.environ.get("RANK") == rank:
        sys.exit(7)
    try:
        end = trains.train(model, ToyData(), name=each,
                           resume_from_checkpoint="missing.ckpt" if each == "refused" else None, **QUIET)
    except LauncherError as error:
        if each != "refused":
            raise
        found(rank=os.environ.get("RANK"), refused=str(error))
        continue
    found(name=each, rank=end["trainer"].global_rank, world=end["trainer"].world_size,
          steps=end["trainer"].global_step, pid=os.getpid(), best=end["best_model_path"])
"""


def two(folder: Path, *arguments: str, code: int = 0) -> str:
    (folder / "elsewhere").mkdir()
    return script(folder, _TWO, *arguments, code=code).output


def test_a_script_trains_twice_on_two_devices_after_a_rejected_training(tmp_path: Path) -> None:
    results = found_in(two(tmp_path))
    # A rejected training comes first: the ranks stay for the next one.
    assert sorted(
        end["rank"] for end in results if "refused" in end and "missing.ckpt does not exist" in end["refused"]
    ) == ["0", "1"]
    found = [end for end in results if "refused" not in end]
    assert sorted((end["name"], end["rank"], end["world"], end["steps"]) for end in found) == [
        ("first", 0, 2, 8), ("first", 1, 2, 8), ("second", 0, 2, 8), ("second", 1, 2, 8),
    ]  # fmt: skip
    assert len({end["pid"] for end in found}) == 2, "the ranks are made once"
    for name in ("first", "second"):
        directory = tmp_path / "elsewhere" / "runs" / name
        (best,) = (directory / "checkpoints").glob("epoch*.ckpt")
        assert {end["best"] for end in found if end["name"] == name} == {str(best)}
        assert len(events_of(directory, "finished")) == 1
        assert sorted(p.name for p in (directory / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    # Every sample once in each training: the ranks share the data, and the second training starts from the beginning.
    for rank in (0, 1):
        steps = [step for step, _, _ in read_trace(tmp_path / "trace", rank)]
        assert steps == [*range(8), *range(8)]
    seen = [n for rank in (0, 1) for _, index, _ in read_trace(tmp_path / "trace", rank)[:8] for n in index]
    assert sorted(seen) == list(range(64))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_rank_ends_the_script_with_its_error_and_no_process_remains(tmp_path: Path, rank: int) -> None:
    # A fixture around every test checks that no process remains.
    output = two(tmp_path, "raise", "second", str(rank), code=1)
    # One rank prints it for all, whichever rank it was; its traceback is the end of the output.
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if "failed first" in line)
    assert lines[start].startswith(f"rank {rank} (")
    assert lines[start].endswith("failed first: ValueError: the user's own mistake")
    # On a slow machine the other rank is ended before it notices the lost connection.
    assert lines[start + 1].startswith(f"other ranks: rank {1 - rank} ")
    assert (lines[-1], output.count("Traceback")) == ("ValueError: the user's own mistake", 1)
    assert [end["name"] for end in found_in(output)] == ["first", "first"]
    directory = tmp_path / "elsewhere" / "runs" / "second"
    assert "ValueError: the user's own mistake" in (directory / "logs" / f"rank-{rank}.log").read_text()
    failed = {event["rank"]: (event["error"], event["step"]) for event in events_of(directory, "failed")}
    assert failed[rank] == ("ValueError: the user's own mistake", 3)
    assert read_run_status(directory).step == 3


def test_a_rank_that_exits_before_training_is_reported(tmp_path: Path) -> None:
    # Otherwise rank zero would wait five minutes for the other rank in the agreement.
    output = two(tmp_path, "leave", "second", "1", code=1)
    assert "AgreementError: rank 1 of this script ended with exit code 7, and a training needs all ranks" in output


def test_a_rank_zero_that_exits_before_training_is_reported(tmp_path: Path) -> None:
    output = two(tmp_path, "leave", "second", "0", code=7)
    assert "AgreementError: rank 0 of this script has ended, and a training needs all ranks" in output


_AFTER = """
import copy
import lightning.pytorch as pl
from torch.utils.data import DataLoader
from tests.support.toy import Numbers

class Whole(Toy):
    def error(self, batch):
        return (self.net(batch[1]).squeeze(-1) - batch[1].sum(-1)) ** 2
    def validation_step(self, batch, batch_idx):
        self.log("val", self.error(batch).mean(), sync_dist=True)
    def test_step(self, batch, batch_idx):
        self.log("test", self.error(batch).mean(), sync_dist=True)
    def predict_step(self, batch, batch_idx):
        return batch[0].tolist()

class Data(ToyData):
    def val_dataloader(self):
        return DataLoader(Numbers(16), batch_size=self.batch_size)
    test_dataloader = predict_dataloader = val_dataloader

class ByHand(Whole):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Linear(8, 1)
    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.error(batch).mean() + self.other(batch[1]).pow(2).mean())
            optimizer.step()
    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.net, self.other)]

class Silent(Whole):
    # torch's compiler does not take Lightning's `self.log`.
    def training_step(self, batch, batch_idx):
        return self.error(batch).mean()

def expected(model):
    # By hand, over every sample once.
    with torch.no_grad():
        return model.error(next(iter(DataLoader(Numbers(16), batch_size=16)))).mean().item()

def trained(model, data, name, **options):
    clip = options.pop("clip", {})
    if os.environ["SLURM_PROCID"] != "0":
        # As a name of the time, or hydra's folder: rank zero's counts.
        clip, name = {**clip, "output_dir": "elsewhere"}, f"{name}-later"
    return coordinator(precision="32", wandb=WandbOptions("offline"), **clip).train(model, data, name=name, **QUIET,
                                                                                   **options)

model, data = Whole(), Data()
start = copy.deepcopy(model.state_dict())
first = trained(model, data, "first", clip={"gradient_clip_val": None})
trainer = first["trainer"]
validated = trainer.validate(model, datamodule=data, verbose=False)
tested = trainer.test(model, datamodule=data, verbose=False, ckpt_path="best")
predicted = trainer.predict(model, datamodule=data)
right = expected(model)
trainer.fit_loop.max_epochs = 2
trainer.fit(model, datamodule=data)
found(what="first", rank=trainer.global_rank, world=trainer.world_size, val=validated[0]["val"],
      test=tested[0]["test"], right=right, predicted=sum(predicted, []), steps=trainer.global_step)
# The same objects once more, from the same weights.
model.load_state_dict(start)
second = trained(model, data, "second", clip={"gradient_clip_val": None})
tested = second["trainer"].test(model, datamodule=data, verbose=False)
found(what="second", test=tested[0]["test"], right=expected(model))
end = trained(by_hand := ByHand(), data, "by-hand", limit_train_batches=2)
found(what="by hand", steps=end["trainer"].global_step, clip=end["trainer"].gradient_clip_val)
compiled = torch.compile(Silent(), backend="eager")
end = trained(compiled, data, "compiled", limit_train_batches=2, limit_val_batches=0)
found(what="compiled", steps=end["trainer"].global_step, same=end["model"] is compiled)
"""


def slurm_task(rank: int, tasks: int) -> dict[str, str]:
    """Variables that `srun --ntasks-per-node=N python train.py` sets in the tasks of one node."""
    values = {"JOB_ID": 4711, "JOB_NAME": "train", "NTASKS": tasks, "NTASKS_PER_NODE": tasks, "NNODES": 1,
              "STEP_ID": 0, "STEP_NUM_TASKS": tasks, "STEP_NUM_NODES": 1, "JOB_NODELIST": "n1",
              "PROCID": rank, "LOCALID": rank, "NODEID": 0}  # fmt: skip
    return {f"SLURM_{name}": str(value) for name, value in values.items()}


def as_slurm_tasks(folder: Path, text: str, *arguments: str, tasks: int) -> list[Finished]:
    """Run a script as `srun` does: all its tasks at once."""
    port = {"MASTER_PORT": str(free_port())}

    def one(rank: int) -> Finished:
        return script(folder, text, *arguments, env={**slurm_task(rank, tasks), **port})

    with ThreadPoolExecutor(tasks) as pool:
        return list(pool.map(one, range(tasks)))


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_returned_trainer_can_continue_and_a_second_training_equals_the_first(tmp_path: Path, tasks: int) -> None:
    outputs = [ended.output for ended in as_slurm_tasks(tmp_path, _AFTER, tasks=tasks)]
    results = [{end["what"]: end for end in found_in(output)} for output in outputs]
    assert sorted((end["first"]["rank"], end["first"]["world"]) for end in results) == [
        (n, tasks) for n in range(tasks)
    ]
    for end in results:
        first, second = end["first"], end["second"]
        assert first["val"] == pytest.approx(first["right"])
        assert first["test"] == pytest.approx(first["right"])
        assert first["steps"] == 2 * 16 // tasks, "the second epoch of `trainer.fit`"
        assert second["test"] == pytest.approx(second["right"])
        assert second["right"] == first["right"], "the same order of the data, independent of the first training"
        assert (end["by hand"]["steps"], end["by hand"]["clip"]) == (4, None)
        assert (end["compiled"]["steps"], end["compiled"]["same"]) == (2, True)
    assert sorted(number for end in results for number in end["first"]["predicted"]) == list(range(16))
    for name in ("first", "second", "by-hand", "compiled"):
        assert not [text for text in notices_of(tmp_path / "runs" / name) if "loader is not changed" in text]
        (file,) = wandb_file.files(tmp_path / "runs" / name)
        kinds = [record.WhichOneof("record_type") for record in wandb_file.records(file)]
        assert kinds.count("exit") == 1, "every W&B run is ended"
    assert not (tmp_path / "elsewhere").exists(), "settings that only rank zero uses come from rank zero"
    # The W&B run stays open after the training, and the next training has a new run.
    rows = wandb_file.history_rows(tmp_path / "runs" / "first")
    assert [row["test"] for row in rows if "test" in row] == [pytest.approx(results[0]["first"]["test"])]
    rows = wandb_file.history_rows(tmp_path / "runs" / "second")
    assert [row["test"] for row in rows if "test" in row] == [pytest.approx(results[0]["second"]["test"])]


_HYDRA = """
import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.3", config_path=None)
def main(config):
    folder = HydraConfig.get().runtime.output_dir
    trains = coordinator(precision="32", devices=2, output_dir=folder + "/runs")
    trainer = trains.train(Toy(lr=config.lr), ToyData(size=16), name="only", **QUIET)["trainer"]
    found(lr=config.lr, rank=trainer.global_rank, world=trainer.world_size, folder=folder, at=os.getcwd())

main()
"""


def test_each_job_of_a_hydra_sweep_is_one_training_of_two_ranks(tmp_path: Path) -> None:
    arguments = ["-m", "+lr=0.1,0.2", "hydra.sweep.dir=sweep", "hydra.job.chdir=true"]
    results = found_in(script(tmp_path, _HYDRA, *arguments).output)
    folders = {0.1: str(tmp_path / "sweep" / "0"), 0.2: str(tmp_path / "sweep" / "1")}
    assert sorted(results, key=lambda end: (end["lr"], end["rank"])) == [
        {"lr": lr, "rank": rank, "world": 2, "folder": folders[lr], "at": folders[lr]}
        for lr in (0.1, 0.2) for rank in (0, 1)
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["0", "1", "multirun.yaml"]
    for folder in folders.values():
        assert [path.name for path in Path(folder).iterdir() if path.is_dir()].count("runs") == 1
        assert len(events_of(Path(folder) / "runs" / "only", "finished")) == 1
