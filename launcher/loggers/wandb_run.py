"""The W&B run: rank zero's alone, with an id that is fixed before the training, and never in its way.

The user's own goes first: a `WandbLogger` of theirs, then a run that their code has begun, then W&B's variables, then
the config, then the launcher's defaults. A run that was not begun here is never ended here.
"""

from __future__ import annotations

import contextlib
import netrc
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from launcher.config.schema import WandbOptions
from launcher.core.atomic_write import private_umask
from launcher.core.secrets import hide_in_arguments, redact
from launcher.loggers.wandb_attributes import say_what_it_lacks
from launcher.loggers.wandb_writer import WandbWriter
from launcher.runs.directory import RunDirectory


def resolve_mode(options: WandbOptions, env: Mapping[str, str]) -> tuple[str, str | None]:
    """Online, offline or disabled, and a notice where that is not what was asked for.

    WANDB_MODE goes before the config, but each of the two can switch W&B off. Without a key W&B would ask for one on
    the terminal, and all ranks would wait for the answer.

    Args:
        options: the config's wish; `auto` is online if a key is at hand.
        env: the environment.
    """
    named = {"dryrun": "offline", "run": "online"}.get(env.get("WANDB_MODE", ""), env.get("WANDB_MODE"))
    if "disabled" in (named, options.mode):
        return "disabled", None
    asked = named if named in ("online", "offline") else options.mode
    if asked == "offline":
        return asked, None
    if env.get("WANDB_API_KEY") or env.get("WANDB_IDENTITY_TOKEN_FILE") or _has_netrc_key(env):
        return "online", None
    return "offline", "W&B is offline: no key is set (`wandb login` makes the next run online)"


def _has_netrc_key(env: Mapping[str, str]) -> bool:
    host = urllib.parse.urlparse(env.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(env.get("NETRC") or Path(env.get("HOME", "/")) / ".netrc")
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


# What the launcher says to W&B, and the variable by which the user says otherwise.
_VARIABLES = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "name": "WANDB_NAME",
    "id": "WANDB_RUN_ID",
    "dir": "WANDB_DIR",
    "resume": "WANDB_RESUME",
}
_SETTINGS = {"init_timeout": "WANDB_INIT_TIMEOUT", "silent": "WANDB_SILENT", "console": "WANDB_CONSOLE"}
# A sweep of W&B's says itself to which project a run belongs, and which one it is.
_OF_A_SWEEP = ("project", "entity", "id")
# Seconds that the end of a training may wait for W&B.
_END_TIMEOUT = 60.0
# Runs that this process began: the next training must not take one for the script's.
_begun_here: set[str] = set()


def init_arguments(options: WandbOptions, run: RunDirectory, env: Mapping[str, str]) -> dict[str, Any]:
    """What `wandb.init` is told: nothing that a variable says, which W&B reads itself.

    Args:
        options: the config's settings.
        run: says the name, the directory and the id.
        env: the environment.
    """
    ours: dict[str, Any] = {
        "project": options.project,
        "entity": options.entity,
        "group": options.group,
        "tags": list(options.tags) or None,
        "name": run.name,
        "id": run.wandb_id,
        "dir": str(run.path),
        "resume": "allow",
    }
    left = {name: value for name, value in ours.items() if value is not None and not env.get(_VARIABLES[name])}
    return {k: v for k, v in left.items() if not (env.get("WANDB_SWEEP_ID") and k in _OF_A_SWEEP)}


@contextlib.contextmanager
def _arguments_without_secrets() -> Generator[None]:
    """W&B writes the command line into its run."""
    before = sys.argv
    sys.argv = hide_in_arguments(before)
    try:
        yield
    finally:
        sys.argv = before


class SwitchedOff:
    """The run where W&B is disabled: W&B's own stand-in, made when somebody asks it for more than to be there.

    Lightning asks every logger for its run at the start, and importing W&B takes a second.

    Args:
        arguments: of `wandb.init`.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments
        # Whoever has imported W&B may log without a logger, as to a run that W&B itself switched off.
        self._run: Any = _switched_off_run(arguments) if "wandb" in sys.modules else None

    def __getattr__(self, name: str) -> Any:
        if self._run is None:
            self._run = _switched_off_run(self._arguments)
        try:
            return getattr(self._run, name)
        except AttributeError:
            # Code for another tracker: nothing is kept of what it logs, as on the other ranks.
            return getattr(DummyLogger().experiment, name)


def _switched_off_run(arguments: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except Exception:  # noqa: BLE001 -- a broken installation raises anything, and nothing was to be logged
        return DummyLogger().experiment
    if wandb.run is not None:
        return DummyLogger().experiment  # it would take the place of a run that the script has begun
    run = wandb.init(**arguments, mode="disabled")
    _begun_here.add(run.id)
    return run


class QueuedWandbLogger(WandbLogger):
    """Lightning's logger on every rank; its rows are written by a thread: a stalled W&B must not hold the training up.

    The run begins when it is first needed, on rank zero alone. A run that the user's code has begun by then is taken
    instead, and left open. Other ranks have Lightning's dummy, which takes all calls; without W&B rank zero has it too.

    Args:
        options: the config's settings.
        run: says the directory and the id.
        values: config and plan, as plain values, for the config of a run that begins here.
        notice: told what was done instead of what was asked for.
        env: the environment.
    """

    def __init__(
        self,
        options: WandbOptions,
        run: RunDirectory,
        values: Mapping[str, Any],
        notice: Callable[[str], None],
        env: Mapping[str, str],
    ) -> None:
        self._asked = init_arguments(options, run, env)
        super().__init__(
            project=env.get("WANDB_PROJECT") or options.project,
            save_dir=env.get("WANDB_DIR") or str(run.path),
            id=env.get("WANDB_RUN_ID") or run.wandb_id,
            name=env.get("WANDB_NAME") or run.name,
        )
        self.writer = WandbWriter()
        self.is_own = False
        self.values = dict(values)
        self._options, self._notice, self._env = options, notice, env
        self.mode, self._remark = resolve_mode(options, env)
        self._is_absent = False
        self._folder = str(run.path)

    @property
    @override
    def log_dir(self) -> str:
        """The run's directory, for code that puts files beside a logger's."""
        return self._folder

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, begun if need be; a dummy on other ranks."""
        if self._experiment is None and not self._is_absent:
            self._experiment = SwitchedOff(self._asked) if self.mode == "disabled" else self._begin()
            self._is_absent = self._experiment is None
        return DummyLogger().experiment if self._experiment is None else self._experiment

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # In this thread: W&B has to begin before a row is queued.
        _ = self.experiment
        if self._is_absent or self.mode == "disabled":
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
            # The script may end its run next.
            self.writer.flush(_END_TIMEOUT)
        super().finalize(status)

    def _begin(self) -> Any:
        """The script's run, or one that begins now; None if there cannot be one."""
        try:
            import wandb
        except Exception as error:  # noqa: BLE001 -- a broken installation raises anything; told, and trained without
            self._notice(f"W&B is not used: {first_line(error)}")
            return None
        active = getattr(wandb, "run", None)
        if active is not None and active.id in _begun_here:
            # Of an earlier training of this process, which has ended.
            active.finish()
            active = None
        if active is not None:
            return active
        if self._remark:
            self._notice(self._remark)
        for attempt in (self.mode, "offline") if self.mode == "online" else (self.mode,):
            run = self._init(wandb, attempt)
            if run is not None:
                self.is_own = True
                _begun_here.add(run.id)
                say_what_it_lacks(run)
                return run
        return None

    def _init(self, wandb: Any, mode: str) -> Any:
        ours = {"init_timeout": self._options.init_timeout, "silent": True, "console": "off"}
        settings = {name: value for name, value in ours.items() if not self._env.get(_SETTINGS[name])}
        try:
            # W&B's own process writes until after the run's end.
            with _arguments_without_secrets(), private_umask():
                run = wandb.init(**self._asked, config=self.values, mode=mode, settings=wandb.Settings(**settings))
        except Exception as error:  # noqa: BLE001 -- W&B raises many kinds, and none may stop a training
            wandb.teardown()
            self._notice(f"W&B {mode} failed: {first_line(error)}")
            return None
        # As Lightning does for runs that it starts: every chart against the true step.
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run


def finish_wandb(
    logger: QueuedWandbLogger, exit_code: int, notice: Callable[[str], None], timeout: float = _END_TIMEOUT
) -> None:
    """Write what is queued, and end the run if it began here; if the upload does not end in time, `wandb sync` is left.

    Args:
        logger: the run's.
        exit_code: what the run ends with.
        notice: told if the upload was left.
        timeout: seconds that the end of a training may wait for W&B.
    """
    began = time.monotonic()
    dropped = logger.writer.close(timeout)
    if dropped:
        notice(f"W&B did not take {dropped} rows; the training was not held up")
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
        notice(f"W&B did not take everything within {timeout:g} s; later: wandb sync {folder}")


def first_line(error: Exception) -> str:
    """Its kind and what it says first."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
