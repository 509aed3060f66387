"""The W&B run: its mode, its fixed id, and its independence of server failures."""

from __future__ import annotations

import http.server
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from launcher.config.schema import WandbOptions
from launcher.loggers.wandb_run import QueuedWandbLogger, finish_wandb
from launcher.loggers.wandb_settings import make_init_arguments, resolve_mode
from launcher.runs.directory import RunDirectory
from tests.support.runs import free_port
from tests.support.wandb_file import history_rows

KEY = "0123456789abcdef0123456789abcdef01234567"
_NOTICE = "W&B is offline: no key is set (`wandb login` makes the next run online)"
_MODES: tuple[Literal["online", "offline", "disabled"], ...] = ("online", "offline", "disabled")


@pytest.fixture(autouse=True)
def is_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning keeps the rank of the last Trainer for the whole process."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)


@pytest.fixture
def no_key(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path)}


@pytest.mark.parametrize(("mode", "env_mode", "key"), list(itertools.product(_MODES, (None, *_MODES), (None, KEY))))
def test_wandbs_variable_overrides_the_config_and_each_can_disable_it(
    no_key: dict[str, str], mode: Literal["online", "offline", "disabled"], env_mode: str | None, key: str | None
) -> None:
    env = no_key | ({"WANDB_MODE": env_mode} if env_mode else {}) | ({"WANDB_API_KEY": key} if key else {})
    asked = "disabled" if "disabled" in (mode, env_mode) else env_mode or mode
    # W&B would ask for a missing key on the terminal, and the training would wait.
    expected = ("offline", _NOTICE) if asked == "online" and key is None else (asked, None)
    assert resolve_mode(WandbOptions(mode=mode), env) == expected


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ("offline", _NOTICE)),
        ({"WANDB_API_KEY": KEY}, ("online", None)),
        ({"WANDB_API_KEY": ""}, ("offline", _NOTICE)),
        ({"WANDB_MODE": "online"}, ("offline", _NOTICE)),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": KEY}, ("online", None)),
        ({"WANDB_IDENTITY_TOKEN_FILE": "/token"}, ("online", None)),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, ("offline", None)),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, ("disabled", None)),
        ({"WANDB_MODE": "dryrun", "WANDB_API_KEY": KEY}, ("offline", None)),
        ({"WANDB_MODE": "run", "WANDB_API_KEY": KEY}, ("online", None)),
        ({"WANDB_MODE": "nonsense"}, ("offline", _NOTICE)),
        ({"WANDB_MODE": "", "WANDB_API_KEY": KEY}, ("online", None)),
    ],
)
def test_auto_takes_wandbs_own_mode_then_a_key(
    no_key: dict[str, str], env: dict[str, str], expected: tuple[str, str | None]
) -> None:
    assert resolve_mode(WandbOptions(), no_key | env) == expected


@pytest.mark.parametrize(
    ("host", "base_url", "mode"),
    [
        ("api.wandb.ai", None, "online"),
        ("wandb.example.org", "https://wandb.example.org", "online"),
        ("api.wandb.ai", "https://wandb.example.org", "offline"),
        ("elsewhere.org", None, "offline"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_auto_finds_a_key_of_this_server_in_netrc(
    tmp_path: Path, no_key: dict[str, str], host: str, base_url: str | None, mode: str, named: bool
) -> None:
    file = tmp_path / ("keys" if named else ".netrc")
    file.write_text(f"machine {host} login user password {KEY}\n")
    file.chmod(0o600)
    env = no_key | ({"WANDB_BASE_URL": base_url} if base_url else {}) | ({"NETRC": str(file)} if named else {})
    assert resolve_mode(WandbOptions(), env)[0] == mode


@pytest.mark.parametrize("content", [b"machine", b"nonsense here\n", b"\xff\xfe\n"])
def test_a_broken_netrc_is_no_key(tmp_path: Path, no_key: dict[str, str], content: bytes) -> None:
    (tmp_path / ".netrc").write_bytes(content)
    assert resolve_mode(WandbOptions(), no_key) == ("offline", _NOTICE)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    path = tmp_path / "runs" / "my-run"
    (path / "wandb").mkdir(parents=True)
    return RunDirectory(path, None, "abcd1234", is_new=True)


@pytest.fixture
def wandb_ends() -> Iterator[None]:
    """W&B's own process ends with the test."""
    yield
    import wandb

    wandb.teardown()


def offline_folders(run: RunDirectory) -> list[Path]:
    return sorted((run.path / "wandb").glob("offline-run-*"))


def begun(options: WandbOptions, run: RunDirectory, notices: list[str], **values: Any) -> QueuedWandbLogger:
    return QueuedWandbLogger(options, run, values, notices.append, os.environ)


# The variables in W&B's documentation for the place and the name of a run, and the launcher's values without them.
_VARIABLES = {
    "project": ("WANDB_PROJECT", "p"),
    "entity": ("WANDB_ENTITY", "e"),
    "group": ("WANDB_RUN_GROUP", "g"),
    "tags": ("WANDB_TAGS", ["t"]),
    "name": ("WANDB_NAME", "my-run"),
    "id": ("WANDB_RUN_ID", "abcd1234"),
    "resume": ("WANDB_RESUME", "allow"),
}


@pytest.mark.parametrize("is_set", [*itertools.combinations(_VARIABLES, 1), (), tuple(_VARIABLES)])
def test_wandb_reads_its_variables_itself(run: RunDirectory, is_set: tuple[str, ...]) -> None:
    options = WandbOptions(project="p", entity="e", group="g", tags=["t"])
    env = {_VARIABLES[name][0]: "theirs" for name in is_set}
    expected = {name: ours for name, (_, ours) in _VARIABLES.items() if name not in is_set}
    assert make_init_arguments(options, run, env) == {**expected, "dir": str(run.path)}
    assert make_init_arguments(options, run, {**env, "WANDB_DIR": "/theirs"}) == expected
    assert make_init_arguments(options, run, dict.fromkeys(env, "")) == make_init_arguments(options, run, {}), (
        "an empty variable counts as unset"
    )


def test_in_a_wandb_sweep_the_sweep_sets_the_run(run: RunDirectory) -> None:
    arguments = make_init_arguments(WandbOptions(entity="e"), run, {"WANDB_SWEEP_ID": "s"})
    assert arguments == {"name": "my-run", "dir": str(run.path), "resume": "allow"}


@pytest.mark.usefixtures("wandb_ends")
def test_a_disabled_logger_accepts_all_calls_and_makes_no_run(run: RunDirectory) -> None:
    import wandb

    notices: list[str] = []
    logger = begun(WandbOptions(mode="disabled"), run, notices)
    use_all_of(logger)
    assert logger.is_own is False
    assert (logger.name, logger.version, logger.save_dir) == ("launcher", "abcd1234", str(run.path))
    wandb.log({"straight": 1.0})
    finish_wandb(logger, 0, notices.append)
    assert notices == []
    assert list((run.path / "wandb").iterdir()) == []


def written_keys(folder: Path) -> set[str]:
    """The rows in all files below a folder; W&B's process writes the last ones when it ends."""
    import wandb

    wandb.teardown()
    return {key.split("/")[0] for row in history_rows(folder) for key in row}


def use_all_of(logger: QueuedWandbLogger) -> None:
    """Methods of a `WandbLogger` that users call and that need no server."""
    import numpy as np
    import torch

    logger.watch(torch.nn.Linear(1, 1))
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.log_text("text", columns=["a"], data=[["b"]])
    logger.log_table("table", columns=["a"], data=[[1]])
    logger.log_image("image", [np.zeros((2, 2, 3), dtype=np.uint8)])
    logger.log_graph(torch.nn.Linear(1, 1))
    logger.experiment.log({"mine": 1.0})
    if vars(rank_zero_only)["rank"] == 0:
        # Lightning's dummy on the other ranks has only methods.
        logger.experiment.config.update({"more": 1})
        logger.experiment.summary["best"] = 1.0
    logger.save()
    logger.finalize("success")


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_on_other_ranks_the_logger_accepts_all_calls_and_begins_nothing(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, mode: Literal["offline", "disabled"]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = begun(WandbOptions(mode=mode), run, [])
    use_all_of(logger)
    assert (logger.name, logger.version, logger.save_dir) == ("launcher", "abcd1234", str(run.path))
    assert logger.is_own is False
    assert list((run.path / "wandb").iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_ends")
def test_offline_makes_a_folder_with_the_given_id_each_time(run: RunDirectory) -> None:
    notices: list[str] = []
    for attempt in (1, 2):
        logger = begun(WandbOptions(tags=["a"], project="p"), run, notices, config={"seed": 1})
        assert list((run.path / "wandb").glob("*run-*")) == offline_folders(run)[: attempt - 1], "nothing begins early"
        assert (logger.experiment.name, logger.experiment.project, logger.experiment.tags) == ("my-run", "p", ("a",))
        assert (logger.version, logger.is_own) == ("abcd1234", True)
        assert logger.experiment.config["config"] == {"seed": 1}
        use_all_of(logger)
        folder = Path(logger.experiment.dir).parent
        finish_wandb(logger, 0, notices.append)
        assert folder in offline_folders(run)
        assert {"loss", "text", "table", "image", "mine"} <= written_keys(folder)
    assert notices == [_NOTICE, _NOTICE]


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_ends")
@pytest.mark.parametrize("mode", ["auto", "disabled"])
def test_the_scripts_run_is_used_unless_wandb_is_disabled_and_stays_open(
    run: RunDirectory, tmp_path: Path, mode: Literal["auto", "disabled"]
) -> None:
    import wandb

    theirs = wandb.init(project="theirs", name="trial", dir=str(tmp_path), mode="offline")
    notices: list[str] = []
    logger = begun(WandbOptions(mode=mode), run, notices)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.experiment.log({"mine": 1.0})
    finish_wandb(logger, 0, notices.append)
    assert wandb.run is theirs
    wandb.log({"afterwards": 1.0})
    wandb.finish()
    assert written_keys(tmp_path) & {"loss", "mine", "afterwards"} == (
        {"afterwards"} if mode == "disabled" else {"loss", "mine", "afterwards"}
    )
    assert (notices, offline_folders(run)) == ([], [])


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_ends")
def test_a_run_of_an_earlier_training_is_not_used_as_the_scripts(run: RunDirectory) -> None:
    first, second = (begun(WandbOptions(project=name), run, []) for name in ("first", "second"))
    assert first.experiment.project == "first"
    # Its end took too long, and nothing waited for it.
    assert second.experiment.project == "second"
    assert second.is_own
    finish_wandb(second, 0, pytest.fail)


class Failing(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_error(500)

    do_GET = do_POST  # noqa: N815 -- http.server looks for this name

    def log_message(self, *arguments: object) -> None:
        del arguments


def refused(stack: list[Callable[[], None]]) -> int:
    return free_port()


def silent(stack: list[Callable[[], None]]) -> int:
    # The kernel accepts the connections; no process reads them.
    server = socket.create_server(("127.0.0.1", 0), backlog=64)
    stack.append(server.close)
    return int(server.getsockname()[1])


def failing(stack: list[Callable[[], None]]) -> int:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    stack += [thread.join, server.server_close, server.shutdown]
    return server.server_port


@pytest.fixture(params=[refused, silent, failing], ids=lambda make: make.__name__)
def broken_server(request: pytest.FixtureRequest) -> Iterator[str]:
    stack: list[Callable[[], None]] = []
    yield f"http://127.0.0.1:{request.param(stack)}"
    while stack:
        stack.pop()()


@pytest.mark.slow
# W&B itself would wait for a minute and a half.
@pytest.mark.timeout(80)
@pytest.mark.usefixtures("wandb_ends")
def test_a_server_that_fails_leaves_an_offline_run_within_the_time(
    broken_server: str, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", broken_server)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    notices: list[str] = []

    logger = begun(WandbOptions(init_timeout=1), run, notices)

    assert logger.experiment.offline
    (notice,) = notices
    assert notice.startswith("W&B online failed: ")
    assert KEY not in notice
    logger.log_metrics({"loss": 1.0})
    finish_wandb(logger, 0, notices.append, timeout=10)
    assert len(notices) == 1
    assert [folder.name.rpartition("-")[2] for folder in offline_folders(run)] == ["abcd1234"]
    files = [file for file in run.path.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if KEY.encode() in file.read_bytes()], "the key stays out of the run's files"


def test_the_environment_is_unchanged(run: RunDirectory) -> None:
    before = dict(os.environ)
    begun(WandbOptions(mode="disabled"), run, []).log_metrics({"loss": 1.0})
    assert dict(os.environ) == before
