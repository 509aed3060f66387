"""The W&B run of a training: on rank zero only, with an id that is fixed before the training, and never blocking it.

The user's settings take precedence: first the user's `WandbLogger`, then a run that the user's code has begun, then
W&B's environment variables, then the config, then the launcher's defaults. A run that did not begin here does not end
here.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from launcher.config.schema import WandbOptions
from launcher.core.atomic_write import private_umask
from launcher.core.errors import describe_error
from launcher.core.secrets import hide_in_arguments, redact
from launcher.loggers.row_queue import RowQueue
from launcher.loggers.wandb_settings import make_init_arguments, make_run_settings, resolve_mode
from launcher.runs.directory import RunDirectory

# Seconds that the end of a training may wait for W&B.
_END_TIMEOUT = 60.0
# Runs that this process began: the next training must not take one for the script's.
_begun_here: set[str] = set()


@contextlib.contextmanager
def _arguments_without_secrets() -> Generator[None]:
    """W&B writes the command line into its run."""
    before = sys.argv
    sys.argv = hide_in_arguments(before)
    try:
        yield
    finally:
        sys.argv = before


class DisabledRun:
    """The run if W&B is disabled: W&B's own disabled run, made at the first access to an attribute.

    Lightning reads every logger's run at the start, and importing W&B takes a second.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments
        # Code that has imported W&B may call `wandb.log` without a logger.
        self._run: Any = _disabled_run(arguments) if "wandb" in sys.modules else None

    def __getattr__(self, name: str) -> Any:
        if self._run is None:
            self._run = _disabled_run(self._arguments)
        try:
            return getattr(self._run, name)
        except AttributeError:
            # Code for another tracker: its calls do nothing, as on the other ranks.
            return getattr(DummyLogger().experiment, name)


def _disabled_run(arguments: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except Exception:  # noqa: BLE001 -- a broken installation raises anything, and nothing would be logged
        return DummyLogger().experiment
    if wandb.run is not None:
        return DummyLogger().experiment  # it would replace the run that the script has begun
    run = wandb.init(**arguments, mode="disabled")
    _begun_here.add(run.id)
    return run


class QueuedWandbLogger(WandbLogger):
    """Lightning's logger on every rank; a background thread writes its rows, so that a stalled W&B never delays a step.

    The run begins at its first use, on rank zero only. A run that the user's code has begun before is used instead,
    and left open. Other ranks have Lightning's dummy, which accepts all calls; without W&B rank zero has it too.

    Args:
        values: config and plan, as plain values, for the config of a run that begins here.
        notice: receives a text if something other than the request was done.
    """

    def __init__(
        self,
        options: WandbOptions,
        run: RunDirectory,
        values: Mapping[str, Any],
        notice: Callable[[str], None],
        env: Mapping[str, str],
    ) -> None:
        self._init_arguments = make_init_arguments(options, run, env)
        super().__init__(
            project=env.get("WANDB_PROJECT") or options.project,
            save_dir=env.get("WANDB_DIR") or str(run.path),
            id=env.get("WANDB_RUN_ID") or run.wandb_id,
            name=env.get("WANDB_NAME") or run.name,
        )
        self.writer = RowQueue()
        self.is_own = False
        self.values = dict(values)
        self._options, self._notice, self._env = options, notice, env
        self.mode, self._mode_notice = resolve_mode(options, env)
        self._is_unavailable = False
        self._folder = str(run.path)

    @property
    @override
    def log_dir(self) -> str:
        """The run's directory, for code that writes files next to a logger's."""
        return self._folder

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, begun if necessary; a dummy on other ranks."""
        if self._experiment is None and not self._is_unavailable:
            self._experiment = DisabledRun(self._init_arguments) if self.mode == "disabled" else self._begin()
            self._is_unavailable = self._experiment is None
        return DummyLogger().experiment if self._experiment is None else self._experiment

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # In this thread: the run must begin before a row is queued.
        _ = self.experiment
        if self._is_unavailable or self.mode == "disabled":
            return
        row = dict(metrics)
        write = super().log_metrics
        self.writer.put(lambda: write(row, step))

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        if self.mode != "disabled":
            super().log_hyperparams(redact(params if isinstance(params, Mapping) else vars(params)))

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        if not self.is_own:
            # The script may end its run after this.
            self.writer.flush(_END_TIMEOUT)
        super().finalize(status)

    def _begin(self) -> Any:
        """Return the script's run, or begin one; None if W&B cannot be used."""
        try:
            import wandb
        except Exception as error:  # noqa: BLE001 -- a broken installation raises anything; reported, and trained without
            self._notice(f"W&B is not used: {describe_error(error)}")
            return None
        active = getattr(wandb, "run", None)
        if active is not None and active.id in _begun_here:
            # Of an earlier training of this process, which has ended.
            active.finish()
            active = None
        if active is not None:
            return active
        if self._mode_notice:
            self._notice(self._mode_notice)
        for attempt in (self.mode, "offline") if self.mode == "online" else (self.mode,):
            run = self._init(wandb, attempt)
            if run is not None:
                self.is_own = True
                _begun_here.add(run.id)
                _explain_missing_attributes(run)
                return run
        return None

    def _init(self, wandb: Any, mode: str) -> Any:
        try:
            settings = wandb.Settings(**make_run_settings(self._options, self._env))
            # W&B's own process writes until after the run's end.
            with _arguments_without_secrets(), private_umask():
                run = wandb.init(**self._init_arguments, config=self.values, mode=mode, settings=settings)
        except Exception as error:  # noqa: BLE001 -- W&B raises many kinds, and none may stop a training
            wandb.teardown()
            self._notice(f"W&B {mode} failed: {describe_error(error)}")
            return None
        # As Lightning does for its runs: every chart against the true step.
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run


def finish_wandb(
    logger: QueuedWandbLogger, exit_code: int, notice: Callable[[str], None], timeout: float = _END_TIMEOUT
) -> None:
    """Write what is queued, and end the run if it began here, within `timeout` seconds.

    `notice` receives the number of rows that were dropped, and how to complete an upload with `wandb sync`.
    """
    began = time.monotonic()
    dropped = logger.writer.close(timeout)
    if dropped:
        notice(f"W&B did not accept {dropped} rows; training was not delayed")
    if not logger.is_own:
        return
    experiment = logger.experiment
    folder = Path(experiment.dir).parent
    done = threading.Event()

    def finish() -> None:
        with contextlib.suppress(Exception):
            experiment.finish(exit_code=exit_code)
        done.set()

    threading.Thread(target=finish, name="launcher-wandb-finish", daemon=True).start()
    if not done.wait(max(timeout - (time.monotonic() - began), 1.0)):
        notice(f"W&B did not finish within {timeout:g} s; to upload later: wandb sync {folder}")


def _explain_missing_attributes(run: Any) -> None:
    """Make the AttributeError of a W&B run, which stays the same object, state how to get TensorBoard's methods."""

    def raise_missing(self: Any, name: str) -> Any:
        raise AttributeError(
            f"the W&B run, which self.logger.experiment is here, has no {name!r}: for TensorBoard's methods set "
            "trainer.logger to true or to a TensorBoardLogger",
            name=name,
            obj=self,
        )

    kind: type[Any] = type(run)

    def reduce(self: Any, protocol: Any) -> Any:
        # Pickled as W&B's own class, which another process has.
        return object.__new__, (kind,), self.__getstate__()

    if not hasattr(kind, "__getattr__"):
        methods = {"__getattr__": raise_missing, "__reduce_ex__": reduce}
        # W&B's own setter accepts known names only.
        object.__setattr__(run, "__class__", type(kind.__name__, (kind,), methods))
