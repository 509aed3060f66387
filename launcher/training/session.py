"""This process as one rank of a run: its rank, its log and its reports to the agent."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.schema import RunConfig
from launcher.core.secrets import find_secrets
from launcher.hardware.topology import Topology
from launcher.process.rank_log import RankLog
from launcher.process.rank_status import RankStatusWriter
from launcher.process.titles import set_rank_title


@dataclass(frozen=True, slots=True)
class RankSession:
    """One rank from its start to its end, with its reports to the agent and its log."""

    topology: Topology
    status: RankStatusWriter
    log: RankLog

    def move_log(self, path: Path, **values: Any) -> None:
        """Move the log into the run directory, and report the new path and `values` to the agent."""
        self.log.move_to(path)
        self.status.update(log=self.log.path, **values)


@contextlib.contextmanager
def rank_session(
    config: RunConfig, env: Mapping[str, str], terminal_ranks: Collection[int] | None
) -> Iterator[RankSession]:
    """Log this rank's output, and report an error that ends it to the agent.

    `env` defines which rank this is. The output of `terminal_ranks` goes to the terminal too; None means all ranks.
    """
    topology = Topology.from_env(env, socket.gethostname())
    set_rank_title(topology.rank, topology.world_size)
    status = RankStatusWriter.from_env(env)
    status.hide_values(find_secrets(config.to_dict()).values())
    log = RankLog(Path(config.runs_dir).absolute(), topology.rank, terminal_ranks)
    try:
        # If the folder cannot be written, opening the run directory reports it.
        with contextlib.suppress(OSError):
            log.attach()
        status.update(log=log.path)
        yield RankSession(topology, status, log)
    except BaseException as error:  # every end of a rank is reported; raised on
        status.record_error(error)
        raise
    finally:
        log.detach()
        log.discard_pending()
