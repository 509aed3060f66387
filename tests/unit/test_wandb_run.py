"""The W&B run: its mode, its fixed id, and that no server's fault reaches the training."""

from __future__ import annotations

import http.server
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from launcher.config import WandbOptions
from launcher.run_directory import RunDirectory
from launcher.wandb_run import finish_wandb, resolve_mode, start_wandb

KEY = "0123456789abcdef0123456789abcdef01234567"
_NOTICE = "W&B is offline: no key is set (`wandb login` makes the next run online)"
_MODES: tuple[Literal["online", "offline", "disabled"], ...] = ("online", "offline", "disabled")


@pytest.fixture
def no_key(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path)}


@pytest.mark.parametrize(("mode", "env_mode", "key"), list(itertools.product(_MODES, (None, *_MODES), (None, KEY))))
def test_the_configs_own_mode_stands_above_the_environment(
    no_key: dict[str, str], mode: Literal["online", "offline", "disabled"], env_mode: str | None, key: str | None
) -> None:
    env = no_key | ({"WANDB_MODE": env_mode} if env_mode else {}) | ({"WANDB_API_KEY": key} if key else {})
    # W&B would ask for a missing key on the terminal, and the training would wait.
    expected = ("offline", _NOTICE) if mode == "online" and key is None else (mode, None)
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


def test_disabled_is_no_run_at_all(run: RunDirectory) -> None:
    notices: list[str] = []
    assert start_wandb(WandbOptions(mode="disabled"), run, {}, notices.append) is None
    assert notices == []
    assert list((run.path / "wandb").iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_ends")
def test_offline_makes_a_folder_with_the_given_id_each_time(run: RunDirectory) -> None:
    notices: list[str] = []
    for attempt in (1, 2):
        logger = start_wandb(WandbOptions(tags=["a"], project="p"), run, {"config": {"seed": 1}}, notices.append)
        assert logger is not None
        assert logger.version == "abcd1234"
        assert (logger.experiment.name, logger.experiment.project, logger.experiment.tags) == ("my-run", "p", ("a",))
        assert logger.experiment.config["config"] == {"seed": 1}
        logger.log_metrics({"loss": 1.0}, step=attempt)
        folder = Path(logger.experiment.dir).parent
        finish_wandb(logger, 0, notices.append)
        assert folder in offline_folders(run)
        assert (folder / "run-abcd1234.wandb").stat().st_size > 0
    assert notices == [_NOTICE, _NOTICE]


class Failing(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_error(500)

    do_GET = do_POST  # noqa: N815 -- http.server looks for this name

    def log_message(self, *words: object) -> None:
        del words


def refused(stack: list[Callable[[], None]]) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def silent(stack: list[Callable[[], None]]) -> int:
    # The kernel accepts the connections; nobody reads them.
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

    logger = start_wandb(WandbOptions(init_timeout=2), run, {}, notices.append)

    assert logger is not None
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


def test_the_environment_is_left_as_it_was(run: RunDirectory) -> None:
    before = dict(os.environ)
    start_wandb(WandbOptions(mode="disabled"), run, {}, pytest.fail)
    assert dict(os.environ) == before
