"""Fixtures around every test, which isolate the tests from each other."""

from __future__ import annotations

import itertools
import locale
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from launcher.core.gc_paused import quick_imports
from tests.support.processes import kill_leftovers
from tests.support.warm import is_foreign

# A background job and nohup ignore these signals, and every process that a test starts would inherit that.
_DEFAULTS = (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGQUIT, signal.SIG_DFL),
)
for _number, _default in _DEFAULTS:
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _default)

# No folder of examples: another user may own the tree.
settings.register_profile("anywhere", database=None)
settings.load_profile("anywhere")


def _use_a_locale_that_is_here() -> None:
    """Otherwise every shell that a test starts warns about the user's locale."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, "")
    except locale.Error:
        os.environ["LC_ALL"] = "C.UTF-8"
    finally:
        locale.setlocale(locale.LC_ALL, before)


_use_a_locale_that_is_here()


@pytest.fixture(scope="session")
def _matplotlib_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One list of fonts for all processes: torchmetrics imports matplotlib, which otherwise rebuilds the list."""
    return tmp_path_factory.mktemp("matplotlib")


@pytest.fixture(scope="session")
def _homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the HOME of each test; `tmp_path` would take a millisecond in every test."""
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _clean_environment(
    monkeypatch: pytest.MonkeyPatch, _homes: Iterator[Path], _matplotlib_folder: Path
) -> Iterator[None]:
    """An environment without rank variables, keys and the user's home, restored afterwards."""
    before = dict(os.environ)
    for name in list(os.environ):
        if is_foreign(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    home = next(_homes)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MPLCONFIGDIR", str(_matplotlib_folder))
    yield
    monkeypatch.undo()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _same_signal_handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before, "the test left a signal handler"


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    yield
    left = kill_leftovers()
    ranks = sys.modules.get("launcher.agreement.script_ranks")
    for process in ranks._started.values() if ranks else ():
        if process.pid > 0:
            process.kill()
            left.append(f"{process.pid}: a rank of pytest's own, which runs the whole suite")
    assert not left, f"the test left processes: {left}"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Test modules import torch, Lightning and more: without this, collections of garbage walk through them all day."""
    with quick_imports():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a developer's machine a missing component skips a test; in CI the test fails."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    # No CI machine of this project has a GPU, so only these tests may skip there.
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False"))
