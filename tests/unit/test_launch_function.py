"""The arguments of `launcher.launch`, and the output that it shows. The calls are in tests/distributed."""

from __future__ import annotations

import linecache
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import launcher.launch_function as module
from launcher import launch
from launcher.agent.function_call import RANK_MARK, CallFailure, CallFolder
from launcher.core.errors import CallError, TrainingError, UsageError
from launcher.hardware.cpus import count_usable_cpus


def test_wrong_arguments_are_reported_together() -> None:
    wrong: dict[str, Any] = {"nproc_per_node": "2", "max_restarts": -1, "timeout": 0, "env": {"A": 1, "B=": "x"},
                             "backend": "glo"}  # fmt: skip
    with pytest.raises(CallError) as caught:
        launch("print", **wrong)  # type: ignore[arg-type]
    found = [(problem.path, problem.message) for problem in caught.value.problems]
    assert [path for path, _ in found] == ["fn", "nproc_per_node", "max_restarts", "timeout", "env", "env", "backend"]
    assert [message for _, message in found[-3:-1]] == [
        "A is 1; expected a text; write '1'", "given the name 'B='; expected a text without ="]  # fmt: skip
    assert re.fullmatch(r"given 'glo'; expected one of .*gloo, .* or None; did you mean gloo\?", found[-1][1])
    for ranks in (0, True, 1.0):
        with pytest.raises(CallError, match=f"given {ranks!r}; expected a number of ranks, at least 1"):
            launch(print, nproc_per_node=ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize(("args", "shown"), [(2.0, "2.0"), ("text", "'text'"), ({1}, "{1}")])
def test_arguments_are_a_tuple_or_a_list(args: Any, shown: str) -> None:
    with pytest.raises(CallError) as caught:
        launch(print, args, 3)  # type: ignore[arg-type]
    assert [f"{problem.path}: {problem.message}" for problem in caught.value.problems] == [
        f"args: given {shown}; expected a tuple or list of all arguments, as in ({shown},)",
        "kwargs: given 3; expected a dict of names and values, or None",
    ]


@pytest.mark.parametrize(
    "value", [["A", "1"], {"A": b"1"}, {"A": "\0"}, {1: "1"}, {"": "1"}, {"A": None}, {"A": Path("/a")}]
)
def test_environment_variables_are_texts(value: Any) -> None:
    with pytest.raises(CallError, match=r"env: .*; expected a "):
        launch(print, env=value)


def test_backends_of_torch_are_accepted_and_others_are_not() -> None:
    for backend in (None, "gloo", "GLOO", "nccl", "cpu:gloo,cuda:nccl"):
        assert list(module._check_backend(backend)) == []
    for backend in ("glo", "", "cpu:gloo,cuda:nccll", 3):
        assert [problem.path for problem in module._check_backend(backend)] == ["backend"]


def test_the_number_of_ranks_may_be_a_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._count_ranks("cpu") == count_usable_cpus()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"given nproc_per_node gpu, but .* no GPU; give a number, cpu or auto"):
        launch(print, nproc_per_node="gpu")


def test_the_message_about_missing_results_names_the_ranks() -> None:
    assert module.describe_missing([0, 1], 0).startswith("no result from ranks 0, 1: the function ended the process")
    assert "rank 2: the agent ended with exit code 7; see" in module.describe_missing([2], 7)


def test_arguments_that_cannot_be_pickled_are_an_error_that_names_the_function() -> None:
    def work(lock: Any) -> None: ...

    with pytest.raises(UsageError, match=r"cannot send .*work and its arguments to the ranks: .*; create objects"):
        launch(work, (threading.Lock(),))


def test_a_rank_cannot_launch_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RANK_MARK, "1")
    with pytest.raises(UsageError, match=r"this is rank 1 of a function .*; a rank cannot launch further ranks"):
        launch(print)


def test_the_variables_of_a_rank_are_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "LAUNCHER_ATTEMPT_DIR", "MINE"):
        monkeypatch.setenv(name, "1")
    assert {"MINE"} == {name for name in module._caller_environment() if os.environ[name] == "1"} & {
        "RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "LAUNCHER_ATTEMPT_DIR", "MINE",
    }  # fmt: skip


def test_only_code_without_a_file_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linecache, "cache", {})
    linecache.getlines(__file__)
    linecache.cache["/tmp/cell_1.py"] = (5, None, ["x = 1\n"], "/tmp/cell_1.py")
    assert module._list_sources() == {"/tmp/cell_1.py": ["x = 1\n"]}


def test_complete_lines_are_shown_with_their_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = CallFolder(tmp_path)
    output = module._Output(folder, 2)
    output.show()
    folder.log(1).write_bytes(b"one\ntw")
    folder.agent_log().write_text("notice: x\n")
    output.show()
    assert capsys.readouterr().out == "notice: x\n[rank 1] one\n"
    with folder.log(1).open("ab") as file:
        file.write("o é".encode()[:-1])
    output.show()
    assert capsys.readouterr().out == ""
    output.show(is_end=True)
    assert capsys.readouterr().out == "[rank 1] two �\n"


def test_each_end_without_results_is_an_error(tmp_path: Path) -> None:
    folder = CallFolder(tmp_path)
    folder.save_result(0, "a")
    with pytest.raises(TrainingError, match="no result from rank 1: the function ended the process with exit code 0"):
        module._collect_results(folder, 2, 0)
    folder.agent_log().write_text("Killed\n")
    with pytest.raises(TrainingError, match=r"no result from rank 1: the agent ended with exit code -9; .*\nKilled"):
        module._collect_results(folder, 2, -9)
    folder.write_failure(CallFailure(1, "rank 1 (a) failed first: x", False, 0))
    with pytest.raises(TrainingError, match=r"rank 1 \(a\) failed first: x") as caught:
        module._collect_results(folder, 2, 1)
    assert (caught.value.rank, caught.value.report) == (1, "rank 1 (a) failed first: x")
    folder.write_failure(CallFailure(1, "rank 1 returned a lock", True, 0))
    with pytest.raises(UsageError, match="rank 1 returned a lock"):
        module._collect_results(folder, 2, 1)
