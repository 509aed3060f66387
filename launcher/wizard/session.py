"""What the questions of the set-up wizard share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

from rich.console import Console

from launcher.core.errors import Problem
from launcher.wizard.machine import MachineFacts
from launcher.wizard.prompter import Prompter


class WizardSession:
    """What the questions share: the prompter, the screen, and facts of the machine, read when first needed."""

    def __init__(self, prompter: Prompter, console: Console, detect: Callable[[], MachineFacts]) -> None:
        self.prompter = prompter
        self.console = console
        self._detect = detect
        # Notices of the last plan, which the review does not repeat.
        self.plan_notices: tuple[str, ...] = ()

    @cached_property
    def machine(self) -> MachineFacts:
        """Facts of this machine."""
        self.show("detecting the hardware of this machine ...", style="dim")
        return self._detect()

    def show(self, text: str, style: str | None = None) -> None:
        """Show a line of plain text."""
        self.console.print(text, style=style, markup=False, highlight=False)

    def show_problems(self, problems: Iterable[Problem], style: str = "red") -> None:
        """Show a line for each problem."""
        for problem in problems:
            self.show(f"  {problem.path}: {problem.message}", style=style)
