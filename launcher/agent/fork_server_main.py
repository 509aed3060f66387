"""The fork server's own start. `multiprocessing` gives it no function to call, only modules to import: this is one."""

from __future__ import annotations

import json
import os
import signal

from launcher.agent.fork_server_process import MODULES_VARIABLE, REPORT_VARIABLE, preload, reporting_to
from launcher.core.gc_paused import quick_imports
from launcher.core.own_modules import forget_safe_path
from launcher.process import parent_death


def become_fork_server() -> None:
    """Die with the agent, leave the terminal's signals to it, import everything, and tell how it went."""
    signal.pthread_sigmask(signal.SIG_BLOCK, parent_death.FOR_RANKS)
    parent_death.die_with_parent()
    forget_safe_path()
    parent_death.fork_server_pid = os.getpid()
    # Out of the terminal's foreground group: Ctrl-C is for the agent, which tells the ranks.
    os.setpgid(0, 0)
    address = os.environ.pop(REPORT_VARIABLE, "")
    modules = json.loads(os.environ.pop(MODULES_VARIABLE, "[]"))
    # What is here then is shared by all ranks: their collectors shall not touch, and so copy, its pages.
    with reporting_to(address) as report, quick_imports():
        report.update(preload(modules))


become_fork_server()
