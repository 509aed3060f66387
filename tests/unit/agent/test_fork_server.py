from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.agent.fork_server import PreloadReport, choose_start_method
from launcher.agent.fork_server_process import USER_MODULES, import_modules
from launcher.agent.preload_modules import list_preload_modules
from launcher.config.launch_options import LaunchOptions
from launcher.config.loading import find_devices_source
from launcher.config.schema import RunConfig, TrainerOptions
from launcher.core.errors import TopologyError
from launcher.hardware.cpus import count_usable_cpus
from launcher.hardware.rank_count import count_requested_ranks, estimate_ranks


def test_ranks_are_forked_unless_that_is_unsafe() -> None:
    assert choose_start_method(PreloadReport()) == ("forkserver", None)
    for report, text in (
        (None, "died"),
        (PreloadReport(cuda=True), "initialises CUDA"),
        (PreloadReport(unsafe=(("theirs", "starts threads (one)"),)), "importing theirs starts threads (one)"),
    ):
        method, notice = choose_start_method(report)
        assert method == "spawn"
        assert notice is not None
        assert text in notice


def test_after_a_failing_module_the_next_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fails_on_import.py").write_text("raise ValueError('mine')\n")
    (tmp_path / "exits_on_import.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "works_on_import.py").write_text("")
    report = import_modules(["fails_on_import", "exits_on_import", "nowhere_at_all", USER_MODULES, "works_on_import"])
    assert "works_on_import" in sys.modules
    assert report["unsafe"] == []


_UNSAFE = {
    "threaded": "import threading\nthreading.Thread(target=threading.Event().wait, name='theirs').start()\n",
    "ranked": "import os\nRANK = int(os.environ.get('RANK', 0))\nLOCAL = os.getenv('LOCAL_RANK')\n",
    "nested": "import ranked_inside\n",
    "ranked_inside": "import os\nHERE = 'RANK' in os.environ\n",
    "harmless": "import os\nHERE = os.environ.get('HOME')\n",
    "crashing": "import os\nos.kill(os.getpid(), 9)\n",
}
# Prints the start method, the notices, and the modules that the fork server has imported.
_SERVE = """
import json, multiprocessing, os, signal, sys
from launcher.agent.fork_server import ForkServer

def loaded(names, queue):
    queue.put([name for name in names if name in sys.modules])

if __name__ == "__main__":
    modules = json.loads(sys.argv[1])
    server, notices = ForkServer(), []
    server.start(modules)
    # As it was born: the server itself blocks signals only when it has imported Python's own modules.
    pid = multiprocessing.forkserver._forkserver._forkserver_pid
    status = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status"))
    assert int(status["SigBlk"], 16) >> (signal.SIGINT - 1) & 1, "Ctrl-C reaches the fork server"
    method = server.choose_start_method(notices.append)
    context = multiprocessing.get_context("forkserver")
    queue = context.SimpleQueue()
    process = context.Process(target=loaded, args=(modules, queue))
    process.start()
    print(json.dumps([method, notices, queue.get()]))
    process.join()
    server.end()
"""


@pytest.mark.parametrize(
    ("packages", "kept", "expected_notices"),
    [
        (["harmless"], ["harmless"], []),
        (["threaded", "harmless"], ["harmless"], ["importing threaded starts threads (theirs): each rank imports it"]),
        (["harmless", "ranked"], ["harmless"], ["importing ranked reads LOCAL_RANK, RANK: each rank imports it"]),
        (["nested"], [], ["importing nested reads RANK: each rank imports it"]),
        (["threaded", "ranked"], [], ["importing ranked reads LOCAL_RANK, RANK; importing threaded starts threads"]),
        (
            ["harmless", "crashing"],
            [],
            ["the fork server died while it imported packages; each rank imports harmless, crashing"],
        ),
    ],
)
def test_a_package_that_is_unsafe_to_fork_is_imported_by_the_ranks(
    packages: list[str], kept: list[str], expected_notices: list[str], tmp_path: Path
) -> None:
    for name, text in _UNSAFE.items():
        (tmp_path / f"{name}.py").write_text(text)
    # A library may create threads.
    (tmp_path / "library.py").write_text(_UNSAFE["threaded"].replace(".start()", ".daemon"))
    (tmp_path / "serve.py").write_text(_SERVE)
    modules = json.dumps(["library", USER_MODULES, *packages])
    command = [sys.executable, "serve.py", modules]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    method, notices, imported = json.loads(done.stdout)
    assert (method, imported) == ("forkserver", ["library", *kept])
    assert len(notices) == len(expected_notices)
    for notice, expected in zip(notices, expected_notices, strict=True):
        assert notice.startswith(expected)


def test_preloaded_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_model.py").write_text("import numpy\n")
    (tmp_path / "my_calls.py").write_text("from rich.table import Table\n")
    config = RunConfig(
        model={"class_path": "my_model.Model", "init_args": {"inner": {"class_path": "torchmetrics.Accuracy"}}},
        trainer=TrainerOptions(callbacks=[{"class_path": "my_calls.Back"}]),
    )
    modules = list_preload_modules(config, {})
    # The ranks import the user's own files.
    assert modules[modules.index(USER_MODULES) + 1 :] == ["numpy", "torchmetrics:Accuracy", "rich.table:Table"]
    assert "wandb" in modules
    assert "deepspeed" not in modules
    # Without the variable DeepSpeed would choose the wrong accelerator.
    zero = RunConfig(strategy="deepspeed_stage_2")
    assert "deepspeed" in list_preload_modules(zero, {"DS_ACCELERATOR": "cpu"})
    assert "deepspeed" not in list_preload_modules(zero, {})


@pytest.mark.parametrize(
    ("config", "options", "ranks"),
    [
        (RunConfig(), LaunchOptions(), 1),
        (RunConfig(devices=3), LaunchOptions(), 3),
        (RunConfig(), LaunchOptions(nproc_per_node=4), 4),
        (RunConfig(accelerator="cpu"), LaunchOptions(nproc_per_node="cpu"), count_usable_cpus()),
        (RunConfig(accelerator="cpu"), LaunchOptions(nproc_per_node="auto"), count_usable_cpus()),
    ],
)
def test_the_number_of_ranks_and_the_guess_without_torch(
    config: RunConfig, options: LaunchOptions, ranks: int, tmp_path: Path
) -> None:
    assert count_requested_ranks(config, options) == ranks
    assert estimate_ranks(config, options, gpus=tmp_path / "none") == ranks


@pytest.mark.parametrize(
    ("visible", "ranks"), [(None, 2), ("1", 1), ("0,1", 2), ("GPU-8f1,GPU-7a2,GPU-6c3", 2), ("", 1), ("0,-1,1", 1)]
)
def test_the_guess_counts_the_visible_gpus_of_the_driver(
    visible: str | None, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert estimate_ranks(RunConfig(), LaunchOptions(), gpus=tmp_path) == ranks
    assert estimate_ranks(RunConfig(accelerator="cpu"), LaunchOptions(), gpus=tmp_path) == 1


def test_two_different_numbers_of_ranks_are_rejected() -> None:
    with pytest.raises(TopologyError, match="--nproc-per-node 4, but devices is 2"):
        count_requested_ranks(RunConfig(devices=2), LaunchOptions(nproc_per_node=4))


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("trainer: {devices: 1}", [], "trainer.devices in FILE is 1; give --devices 2 instead"),
        ("fit: {trainer: {devices: 1}}", [], "trainer.devices in FILE is 1; give --devices 2 instead"),
        ("devices: 1", ["--seed", "3"], "devices in FILE is 1; give --devices 2 instead"),
        ("devices: 3", ["--trainer.devices=1"], "--trainer.devices is 1; remove one of them"),
        ("devices: 3", ["--devices", "1"], "--devices is 1; remove one of them"),
    ],
)
def test_the_place_of_the_other_number_is_reported(
    text: str, overrides: list[str], expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    source = find_devices_source([file], overrides)
    with pytest.raises(TopologyError) as raised:
        count_requested_ranks(RunConfig(devices=1), LaunchOptions(nproc_per_node=2, devices_source=source))
    assert str(raised.value) == f"given --nproc-per-node 2, but {expected.replace('FILE', str(file))}"


def test_modules_that_the_agent_imports_before_torch_do_not_import_it() -> None:
    script = ("import sys, launcher.cli.main, launcher.agent.start, launcher.agent.fork_server\n"
              "import launcher.hardware.rank_count\n"
              "print([m for m in ('torch', 'lightning', 'wandb', 'deepspeed') if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


_WARM = """
from importlib.metadata import entry_points
import json, os
from launcher.agent.fork_server_process import import_modules, USER_MODULES
import lightning.pytorch
import lightning.fabric.utilities.registry as registry
before = dict(os.environ)
report = import_modules(["launcher.training.run", USER_MODULES, "launcher.agent.warm_caches"])
assert report["unsafe"] == [], report
assert os.environ == before
import launcher.agent.warm_caches
found = registry.entry_points(group="lightning.pytorch.callbacks_factory")
assert found is registry.entry_points(group="lightning.pytorch.callbacks_factory"), "not kept"
assert found == entry_points(group="lightning.pytorch.callbacks_factory")
assert registry.entry_points(group="console_scripts") == entry_points(group="console_scripts")
"""


def test_filling_caches_survives_a_fork() -> None:
    subprocess.run([sys.executable, "-c", _WARM], check=True, timeout=120)
