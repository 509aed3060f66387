"""A signal ends a script with the same exception as Python's own handler."""

from __future__ import annotations

import signal

import pytest

from launcher.core.errors import Interrupted, LauncherError, describe_stop_signal
from launcher.training.script_end import ends_script


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_script_that_handles_failures_ends_on_a_signal(number: int) -> None:
    inside = Interrupted(number, checkpoint="last.ckpt", step=7)
    # Lightning turns a KeyboardInterrupt into exit code 1.
    assert not isinstance(inside, (KeyboardInterrupt, SystemExit, Exception))

    @ends_script
    def train() -> None:
        raise inside

    with pytest.raises(SystemExit) as caught:
        train()
    error = caught.value
    assert isinstance(error, Interrupted)
    assert not isinstance(error, (Exception, LauncherError))
    assert isinstance(error, KeyboardInterrupt) == (number == signal.SIGINT)
    assert (error.code, error.exit_code, error.signal_number) == (128 + number, 128 + number, number)
    assert (error.checkpoint, error.step, str(error)) == (
        "last.ckpt",
        7,
        f"stopped by {describe_stop_signal(number)} after step 7",
    )
    assert error.__suppress_context__


@pytest.mark.parametrize("leaves", [True, False])
def test_scripts_own_handler_is_called_first_and_may_exit(leaves: bool) -> None:
    called: list[str] = []

    def handler() -> None:
        called.append("called")
        if leaves:
            raise SystemExit(77)

    @ends_script
    def train() -> None:
        interruption = Interrupted(signal.SIGTERM, checkpoint=None, step=7)
        interruption.users_handler = handler
        raise interruption

    with pytest.raises(SystemExit) as caught:
        train()
    assert (caught.value.code, called) == (77 if leaves else 143, ["called"])
