"""How the ranks of a run with a config are started."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.agent.preload_modules import list_preload_modules
from launcher.agent.rank_main import RankCommand
from launcher.agent.start_request import StartRequest, share_cores
from launcher.config.launch_options import LaunchOptions
from launcher.config.schema import RunConfig
from launcher.hardware.rank_count import count_requested_ranks, estimate_ranks


def make_start_request(config: RunConfig, options: LaunchOptions, command: RankCommand) -> StartRequest:
    """The request for the ranks of `config`; one rank without restarts and fallback needs no agent."""

    def make_variables(ranks: int) -> dict[str, str]:
        # DeepSpeed chooses its accelerator on import.
        return share_cores(ranks) | ({"DS_ACCELERATOR": "cpu"} if config.accelerator == "cpu" else {})

    has_directory = config.resume != "none" and config.name
    return StartRequest(
        command,
        options,
        estimated_ranks=estimate_ranks(config, options),
        count_ranks=lambda: count_requested_ranks(config, options),
        list_modules=lambda: list_preload_modules(config, os.environ),
        make_variables=make_variables,
        always_has_agent=config.on_oom == "next",
        record_directory=Path(config.runs_dir) / config.name if has_directory and config.name else None,
    )
