"""The process that starts the ranks of `launcher.launch`: `main(FOLDER, PARENT)`.

It is apart from the caller, which may be a notebook kernel, a thread or a script without a `__main__` guard: it ends
with the caller, nothing of the caller is forked, and no rank imports the caller's script again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.agent.failure_report import RankOutcome, describe_failure
from launcher.agent.fork_server_process import USER_MODULES
from launcher.agent.function_call import CallFailure, CallFolder
from launcher.agent.function_rank import run_function
from launcher.agent.rank_main import RankCommand
from launcher.agent.restart_policy import RestartDecision
from launcher.agent.start import start_ranks
from launcher.agent.start_request import StartRequest
from launcher.config.launch_options import LaunchOptions
from launcher.core.errors import LauncherError
from launcher.process import parent_death

# What each rank imports before it calls the function.
_MODULES = ("torch", "torch.distributed", "cloudpickle", "launcher.agent.rank_main", "launcher.agent.function_rank")

# Seconds that the other ranks have to report their own error after a failure.
_EXIT_TIMEOUT = 1.0


def main(arguments: Sequence[str]) -> int:
    """Run the call in the folder `arguments[0]`; end with the process `arguments[1]`. Returns the exit code."""
    parent_death.die_with_parent(int(arguments[1]))
    folder = CallFolder(Path(arguments[0]))
    options = folder.read_options()
    attempts: list[RankOutcome] = []

    def report(first: RankOutcome, outcomes: Sequence[RankOutcome], decision: RestartDecision) -> None:
        attempts.append(first)
        text = describe_failure(first, outcomes)
        if decision.restart:
            sys.stderr.write(f"{text}\n{decision.reason.partition(';')[0]}\n")
            sys.stderr.flush()
            return
        is_explained = first.error is not None and first.error.explained
        shown = first.error.message if first.error is not None and is_explained else text
        folder.write_failure(CallFailure(first.rank, shown, is_explained, len(attempts) - 1))

    request = StartRequest(
        RankCommand(run_function, (str(folder.path),)),
        LaunchOptions(max_restarts=options.max_restarts),
        estimated_ranks=options.ranks,
        count_ranks=lambda: options.ranks,
        list_modules=lambda: [*_MODULES, *options.modules, USER_MODULES],
        always_has_agent=True,
        is_plain=True,
        exit_timeout=_EXIT_TIMEOUT,
        report_failure=report,
    )
    try:
        code = start_ranks(request)
    except LauncherError as error:
        folder.write_failure(CallFailure(0, str(error), True, 0))
        return error.exit_code
    return 1 if code is None else code
