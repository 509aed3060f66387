"""`RunContext`: the parameters that functions inside a rank share, as one frozen record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
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
    """One rank of a run, after the ranks have agreed on the plan.

    Attributes:
        run: its `resume_from` is the checkpoint to resume from or to evaluate.
        store: the ranks' c10d store.
        attempt: name of this start of all ranks.
        given: objects made in code, trained instead of those that the config names.
        stays_open: whether the process group and the W&B run stay open for the returned Trainer.
        kept_folder: what the ranks of this launch keep for its next attempt; None if there will be none.
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
    kept_folder: Path | None = None

    @property
    def trust(self) -> Trust:
        """The checkpoints that may run code when they are loaded: this run's own, or all with `resume_trust`."""
        from launcher.checkpoint.reader import Trust

        return Trust(self.run.path, everywhere=self.config.resume_trust, kept=self.kept_folder)

    @property
    def arguments_to_continue(self) -> str | None:
        """The arguments with which a script continues the run; None for a command."""
        name = json.dumps(self.run.name)
        if self.given is not None:
            return f'train(..., name={name}, resume_from_checkpoint="auto")'
        return f'name={name} and resume="auto" in the config' if self.stays_open else None

    @property
    def attempt_store(self) -> Any:
        """The store, with keys of this attempt only."""
        from torch.distributed import PrefixStore

        return PrefixStore(f"launcher/{self.attempt}", self.store)
