"""`RunContext`: what every function inside a rank of a run may need, as one frozen record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.config.schema import RunConfig
from launcher.core.output import RunOutput
from launcher.hardware.topology import Topology
from launcher.planning.plan import Plan
from launcher.process.rank_status import RankStatusWriter
from launcher.runs.directory import RunDirectory

if TYPE_CHECKING:
    from launcher.checkpoint.reader import Trust
    from launcher.user_code.objects import UserObjects


@dataclass(frozen=True)
class RunContext:
    """One rank of a run, from the agreement on.

    Attributes:
        config: what was asked for.
        topology: this rank's place.
        plan: what the ranks agreed on.
        run: the run's directory.
        store: the ranks' c10d store.
        attempt: name of this start of all ranks.
        output: events and terminal.
        status: what this rank reports to its agent.
        given: objects made in code, trained instead of what the config names; None without any.
        stays_open: whether process group and W&B run stay open for the Trainer that is returned.
    """

    config: RunConfig
    topology: Topology
    plan: Plan
    run: RunDirectory
    store: Any
    attempt: str
    output: RunOutput
    status: RankStatusWriter
    given: UserObjects | None = None
    stays_open: bool = False

    @property
    def trust(self) -> Trust:
        """Whose pickles may be loaded: this run's own, and others if the config says so."""
        from launcher.checkpoint.reader import Trust

        return Trust(self.run.path, everywhere=self.config.resume_trust)

    @property
    def attempt_store(self) -> Any:
        """The store with keys of this attempt alone."""
        from torch.distributed import PrefixStore

        return PrefixStore(f"launcher/{self.attempt}", self.store)
