"""Arguments of `wandb.init`: the mode, and what the config sets unless an environment variable does."""

from __future__ import annotations

import netrc
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.config.schema import WandbOptions
from launcher.runs.directory import RunDirectory

# Arguments that the launcher passes to W&B, and the variable that overrides each.
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
# An agent of a W&B sweep sets the project and the run id itself.
_SET_BY_SWEEP = ("project", "entity", "id")


def resolve_mode(options: WandbOptions, env: Mapping[str, str]) -> tuple[str, str | None]:
    """Return online, offline or disabled, and a notice if that is not what was requested.

    WANDB_MODE overrides the config, but each of the two can disable W&B; `auto` is online if a key is found. Without a
    key W&B would ask for one on the terminal, and all ranks would wait for the answer.
    """
    named = {"dryrun": "offline", "run": "online"}.get(env.get("WANDB_MODE", ""), env.get("WANDB_MODE"))
    if "disabled" in (named, options.mode):
        return "disabled", None
    requested = named if named in ("online", "offline") else options.mode
    if requested == "offline":
        return requested, None
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


def make_init_arguments(options: WandbOptions, run: RunDirectory, env: Mapping[str, str]) -> dict[str, Any]:
    """Arguments for `wandb.init`, without those that a variable sets, which W&B reads itself."""
    arguments: dict[str, Any] = {
        "project": options.project,
        "entity": options.entity,
        "group": options.group,
        "tags": list(options.tags) or None,
        "name": run.name,
        "id": run.wandb_id,
        "dir": str(run.path),
        "resume": "allow",
    }
    skipped = _SET_BY_SWEEP if env.get("WANDB_SWEEP_ID") else ()
    return {
        name: value
        for name, value in arguments.items()
        if value is not None and not env.get(_VARIABLES[name]) and name not in skipped
    }


def make_run_settings(options: WandbOptions, env: Mapping[str, str]) -> dict[str, Any]:
    """Fields of `wandb.Settings`, without those that a variable sets."""
    fields = {"init_timeout": options.init_timeout, "silent": True, "console": "off"}
    return {name: value for name, value in fields.items() if not env.get(_SETTINGS[name])}
