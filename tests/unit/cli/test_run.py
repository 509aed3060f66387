"""`launcher run`: torchrun's flags, and the checks of its command line."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from launcher.agent.script_start import count_script_ranks, make_script_variables
from launcher.cli.run import (
    build_parser,
    check_preload,
    find_search_path,
    make_run_name,
    prepare_script_submission,
    read_preload,
    remove_options,
    run,
)
from launcher.cli.script_target import check_script, find_misplaced_options
from launcher.cli.torchrun_flags import read_flags, read_hidden_ranks
from launcher.config.launch_options import LaunchOptions, read_launch_options
from launcher.core.errors import CommandLineError, LaunchError, TopologyError, UsageError
from launcher.hardware.devices import available_kind

REFUSED = ("event_log_handler", "logs_specs", "duplicate_stdout_filters", "duplicate_stderr_filters", "numa_binding",
           "virtual_local_rank", "local_addr", "shutdown_timeout")  # fmt: skip
TORCHRUN = [action for action in get_args_parser()._actions if action.option_strings and action.dest != "help"]


@pytest.mark.parametrize("action", TORCHRUN, ids=lambda action: action.dest)
def test_every_flag_of_torchrun_is_known_or_explained(action: Any) -> None:
    for spelling in action.option_strings:
        arguments = [spelling, *([] if action.nargs == 0 else ["1"]), "train.py", spelling, "x"]
        if action.dest in REFUSED:
            with pytest.raises(LaunchError, match=r"launcher writes|not supported|filter the files|the ranks have"):
                build_parser().parse_args(arguments)
            continue
        options = build_parser().parse_args(arguments)
        assert options.script == "train.py"
        assert options.arguments == [spelling, "x"], "arguments of the script are not read"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--standalone", "--nproc_per_node=4"], {"nproc_per_node": 4}),
        (["--nnode", "1", "--nproc-per-node", "2"], {"nproc_per_node": 2}),
        (["--nproc-per-node", "gpu", "--max_restarts", "3"], {"nproc_per_node": "gpu", "max_restarts": 3}),
        (
            ["--nnodes", "2", "--node-rank", "1", "--master-addr", "a", "--master-port", "1234"],
            {"max_nodes": 2, "min_nodes": 2, "node_rank": 1, "endpoint_host": "a", "endpoint_port": 1234},
        ),
        (
            ["--nnodes", "1:4", "--rdzv-backend", "c10d", "--rdzv-endpoint", "a:5", "--rdzv-id", "job"],
            {"min_nodes": 1, "max_nodes": 4, "endpoint_host": "a", "endpoint_port": 5, "run_id": "job"},
        ),
        (["--master_port", "1234"], {"endpoint_port": 1234}),
        (["--standalone", "--rdzv-endpoint", "far:1", "--nnodes", "2"], {}),
    ],
)
def test_flags_of_torchrun_become_launch_options(arguments: list[str], expected: dict[str, Any]) -> None:
    options = build_parser().parse_args([*arguments, "train.py"])
    found = read_launch_options({**read_flags(options, {}), "terminal_ranks": "all"})
    assert found == LaunchOptions(terminal_ranks=None, **expected)


def test_defaults_come_from_torchruns_variables() -> None:
    options = build_parser().parse_args(["--max-restarts", "1", "train.py"])
    env = {"PET_NPROC_PER_NODE": "2", "PET_MAX_RESTARTS": "5", "PET_RDZV_BACKEND": "c10d"}
    flags = read_flags(options, env)
    assert (flags["nproc_per_node"], flags["max_restarts"], flags["rdzv_backend"]) == ("2", "1", "c10d")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], [0, 1, 2]),
        (["--local-ranks-filter", "0,2"], [0, 2]),
        (["--redirects", "3"], []),
        (["-r", "0:3,1:3"], [2]),
        (["--tee", "3"], [0, 1, 2]),
        (["-r", "1:3", "--local_ranks_filter=0,1"], [0]),
    ],
)
def test_the_output_of_ranks_is_hidden_as_in_torchrun(arguments: list[str], shown: list[int]) -> None:
    hides = read_hidden_ranks(read_flags(build_parser().parse_args([*arguments, "train.py"]), {}))
    assert [rank for rank in range(3) if not hides(rank)] == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rdzv-backend", "etcd"], "--rdzv-backend: given 'etcd'; expected c10d or static"),
        (["--redirects", "1"], "--redirects: given '1'; expected 3 or 0"),
        (["--redirects", "out"], "--redirects: given 'out'; expected 0 to 3"),
        (["--local-ranks-filter", "zero"], "--local-ranks-filter: given 'zero'; expected local ranks"),
        (["--numa-binding", "node"], "--numa-binding: not supported"),
        (["--virtual-local-rank"], "--virtual-local-rank: not supported"),
    ],
)
def test_a_wrong_or_different_flag_is_explained(arguments: list[str], message: str) -> None:
    with pytest.raises(LaunchError) as error:
        read_hidden_ranks(read_flags(build_parser().parse_args([*arguments, "train.py"]), {}))
    assert message in str(error.value)


_ACCELERATE = [
    "config_file", "quiet", "cpu", "multi_gpu", "tpu", "mixed_precision", "num_processes", "num_machines",
    "num_cpu_threads_per_process", "enable_cpu_affinity", "dynamo_backend", "dynamo_mode", "use_deepspeed",
    "use_fsdp", "use_megatron_lm", "use_parallelism_config", "gpu_ids", "same_network", "machine_rank",
    "main_process_ip", "main_process_port", "tpu_cluster", "vm", "env", "main_training_function", "downcast_bf16",
    "deepspeed_config_file", "zero_stage", "offload_optimizer_device", "offload_param_nvme_path",
    "gradient_accumulation_steps", "gradient_clipping", "zero3_init_flag", "deepspeed_hostfile", "fsdp_version",
    "fsdp_state_dict_type", "megatron_lm_tp_degree", "fp8_backend", "aws_access_key_id", "mpirun_hostfile",
    "parallelism_config_tp_size",
]  # fmt: skip


@pytest.mark.parametrize("name", [*_ACCELERATE, "num_gpus", "num_nodes", "hostfile", "include"])
@pytest.mark.parametrize("spell", [str, lambda name: name.replace("_", "-")])
def test_a_flag_of_accelerate_or_deepspeed_is_answered_with_what_to_write(name: str, spell: Any) -> None:
    parser = build_parser()
    for given in ([f"--{spell(name)}", "1", "train.py"], [f"--{spell(name)}=1", "train.py"]):
        with pytest.raises(CommandLineError) as error:
            parser.parse_args(given)
        found = str(error.value)
        assert found.startswith(f"`launcher run` has no option --{spell(name)}; "), found
        assert "did you mean" not in found
        assert "--help" not in found
        for option in re.findall(r"(--[a-z][a-z-]+)", found.partition("; ")[2]):
            assert option in parser.list_options(), "an option that is named exists"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--resume", "x"], "`launcher run` has no option --resume; `launcher run --help` lists the options"),
        (["--max-restrats", "1"], "`launcher run` has no option --max-restrats; did you mean --max-restarts?"),
        (["--max_restrats", "1"], "`launcher run` has no option --max_restrats; did you mean --max-restarts?"),
        (["--rdzv", "x"], "ambiguous option: --rdzv could match --rdzv-endpoint, --rdzv-id, --rdzv-conf, "),
    ],
)
def test_a_wrong_option_is_answered_with_a_similar_one_in_one_spelling(given: list[str], message: str) -> None:
    with pytest.raises(CommandLineError) as error:
        build_parser().parse_args([*given, "train.py"])
    assert message in str(error.value)
    assert "rdzv_" not in str(error.value)


@pytest.mark.parametrize("given", ["--nproc", "--nproc-per", "--nproc_per", "--nproc_per_nod"])
def test_an_abbreviation_of_an_option_with_two_spellings_is_that_option(given: str) -> None:
    assert build_parser().parse_args([given, "2", "train.py"]).nproc_per_node == "2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--name", "a/b"], "--name: given 'a/b'; expected up to 100 letters"),
        (["--name", "../b"], "--name: given '../b'; expected up to 100 letters"),
        (["--preload", "torch,no_such_package.x"], "--preload: given no_such_package.x, which is not installed"),
        (["--nproc-per-node", "2", "--terminal-ranks", "0,5"], "--terminal-ranks: given 5; expected ranks 0 to 1"),
        (["--terminal-ranks", "1"], "--terminal-ranks: given 1; there is only rank 0"),
        (["--nproc-per-node", "2", "--local-ranks-filter", "2"], "--local-ranks-filter: given 2; expected less than"),
    ],
)
def test_a_value_that_would_have_no_effect_is_refused(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    with pytest.raises(LaunchError) as error:
        run([*given, "train.py"])
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_modules_to_preload_exist() -> None:
    check_preload(["torch.nn", "json", "torch:nn"])


def test_ranks_of_other_nodes_may_be_shown() -> None:
    flags = {"nproc_per_node": "2", "nnodes": "1:3", "rdzv_endpoint": "a:1", "terminal_ranks": "5"}
    assert read_launch_options(flags).terminal_ranks == frozenset({5})
    with pytest.raises(LaunchError, match="terminal-ranks: given 6; expected ranks 0 to 5"):
        read_launch_options({**flags, "terminal_ranks": "6"})


def test_a_script_has_the_variables_that_torchrun_sets() -> None:
    handled = next(action.default for action in TORCHRUN if action.dest == "signals_to_handle")
    assert make_script_variables(1) == {"TORCHELASTIC_SIGNALS_TO_HANDLE": handled}
    assert make_script_variables(2) == {"TORCHELASTIC_SIGNALS_TO_HANDLE": handled, "OMP_NUM_THREADS": "1"}


def test_gpus_that_are_missing_are_reported_with_options_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if available_kind("auto") != "cpu":
        pytest.skip("a machine with a GPU")
    with pytest.raises(TopologyError, match=r"given --nproc-per-node gpu, but .* no GPU; give a number, cpu or auto"):
        count_script_ranks("gpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--nproc-per-node", "2", "4", "1"], "4: write the script's arguments after --, as in -- 4 1"),
        (["--lr", "1e-3"], "--lr: write the script's arguments after --, as in -- --lr 1e-3"),
        (["--lr=1"], "--lr: write the script's arguments after --, as in -- --lr=1"),
        (["--max-restrats", "1"], "--max-restrats: did you mean --max-restarts? write the script's arguments after --"),
        (["--num_processes", "2"], "has no option --num_processes; write --nproc-per-node N"),
        (["--name", "a/b"], "--name: given 'a/b'"),
    ],
)
def test_arguments_of_a_submitted_script_follow_two_dashes(given: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        prepare_script_submission(given, [__file__])
    assert message in str(error.value)


def test_a_script_is_checked_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "run.yaml").write_text("")
    assert check_script("train.py") == "file"
    for folder, names in {"app": ["__main__"], "pkg": ["__init__", "part"], "pkg/sub": ["__init__", "__main__"],
                          "space/inner": ["part"], "lazy": ["__init__"]}.items():  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / f"{name}.py").write_text("__path__ = []" if folder == "lazy" else "raise SystemExit")
    assert check_script("app") == "file", "a folder with a __main__.py is a script too"
    for name in ("app", "pkg.part", "pkg.sub", "space.inner.part", "lazy.any", "json.tool", "torch.distributed.run"):
        assert check_script(name, is_module=True) == "module"
    assert check_script("train", is_module=True) == "module"
    assert check_script("nvidia-smi", is_program=True) == "program"
    for script, options, message in (
        (None, {}, "SCRIPT: not given; give a Python file, or -m and a module"),
        ("missing.py", {}, f"given 'missing.py', which does not exist in {tmp_path}; give the path"),
        ("trian.py", {}, "; did you mean train.py?"),
        ("run.yaml", {}, "a config is for `launcher fit --config run.yaml`"),
        ("--lr", {}, "not an option of `launcher run`"),
        ("missing.mod", {"is_module": True}, f"there is no module 'missing' in {tmp_path} or installed"),
        ("pkg.nope", {"is_module": True}, "given 'pkg.nope', but there is no module 'pkg.nope'; check the name"),
        ("pkg.nope.x", {"is_module": True}, "given 'pkg.nope.x', but there is no module 'pkg.nope'; check the name"),
        ("train.x", {"is_module": True}, "given 'train.x', but there is no module 'train.x'; check the name"),
        ("pkg", {"is_module": True}, "given 'pkg', a package without a module __main__; give one of its modules"),
        ("space", {"is_module": True}, "given 'space', a package without a module __main__; give one"),
        ("space.nope", {"is_module": True}, "given 'space.nope', but there is no module 'space.nope'; check the name"),
        ("pkg", {}, "given 'pkg', a folder without a __main__.py; give the path of a Python file"),
        ("x", {"is_module": True, "is_program": True}, "--no-python: given with -m"),
    ):
        with pytest.raises(LaunchError) as error:
            check_script(script, **options)
        assert message in str(error.value)


def test_the_names_and_paths_of_a_run() -> None:
    now = time.struct_time((2026, 11, 29, 17, 5, 9, 0, 0, 0))
    assert make_run_name("src/train model.py", now) == "20261129-170509-train-model"
    assert make_run_name("my_pkg.train", now) == "20261129-170509-my_pkg.train"
    assert read_preload(None) is None
    assert read_preload("none") == ()
    assert read_preload("torch, lightning") == ("torch", "lightning")
    for path in (["/work", "/env/bin", "/lib"], ["", "/env/bin", "/lib"], ["/work", "/lib"], ["/env/bin", "/lib"]):
        assert find_search_path(path, Path("/work"), "/env/bin/launcher") == ["/lib"]


def test_a_script_is_submitted_with_the_options_that_the_job_does_not_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    options = ["--nproc-per-node", "4", "--name=a", "--max-restarts", "2", "--runs_dir", "out"]
    found = prepare_script_submission(options, ["train.py", "--name", "mine"])
    assert (found.name, found.runs_dir, found.devices) == ("a", "out", 4)
    assert found.command.options == ("--max-restarts", "2")
    assert found.command.script == ("train.py", "--name", "mine")
    with pytest.raises(LaunchError, match="--nnodes: the job sets it on its nodes; use --nodes"):
        prepare_script_submission(["--nnodes", "2", "--rdzv-endpoint", "a:1"], ["train.py"])
    with pytest.raises(LaunchError, match="--nproc-per-node: given gpu; expected a number here, or --gpus-per-node"):
        prepare_script_submission(["--nproc-per-node", "gpu"], ["train.py"])
    assert remove_options(["--name", "a", "--x", "--runs_dir=b"], ["name", "runs-dir"]) == ["--x"]


def test_options_of_the_launcher_after_the_script_are_reported() -> None:
    given = ["--lr", "1", "--nproc-per-node", "2", "--nproc_per_node=2", "--nnodes", "--name", "x"]
    assert find_misplaced_options(given) == ["--nproc-per-node", "--nproc_per_node=2", "--nnodes"]
