"""`SetupWizard`: from a model to a config in five steps, asking through whatever asks."""

from __future__ import annotations

import os
from collections.abc import Callable

from rich.console import Console

from launcher.core.terminal import make_console
from launcher.wizard import steps
from launcher.wizard.answers import WizardConfig
from launcher.wizard.machine import MachineFacts, detect_machine
from launcher.wizard.prompter import Choice, Prompter, make_prompter
from launcher.wizard.steps import WizardSession

_WRITE, _LEAVE = "write", "leave"
_STEPS: tuple[tuple[str, Callable[[WizardConfig, WizardSession], WizardConfig]], ...] = (
    ("model and data", steps.ask_model_and_data),
    ("hardware and cluster", steps.ask_hardware),
    ("precision and strategy", steps.ask_precision_and_strategy),
    ("logging", steps.ask_logging),
)


class SetupWizard:
    """Asks for what a config needs: model and data, hardware, precision and strategy, logging; then shows it.

    Args:
        prompter: asks the questions; this process's terminal if not given.
        console: shows what is no question.
        look: finds out about the machine; called once, when it is first needed.
    """

    def __init__(
        self,
        prompter: Prompter | None = None,
        *,
        console: Console | None = None,
        look: Callable[[], MachineFacts] = detect_machine,
    ) -> None:
        self._desk = WizardSession(prompter or make_prompter(os.environ), console or make_console(), look)

    def run(self, start: WizardConfig | None = None) -> WizardConfig | None:
        """Ask everything; nothing is written.

        Args:
            start: answers to begin with, all of which can be changed.

        Returns:
            The answers, valid as a config; None if the user left at the review.

        Raises:
            KeyboardInterrupt: Ctrl-C at any question.
            EOFError: the input ended.
        """
        config = start or WizardConfig()
        for number in range(len(_STEPS)):
            config = self._ask(number, config)
        while True:
            answer = self._review(config)
            if isinstance(answer, int):
                config = self._ask(answer, config)
            else:
                return config if answer == _WRITE else None

    def _ask(self, number: int, config: WizardConfig) -> WizardConfig:
        title, ask = _STEPS[number]
        self._title(number, title)
        return ask(config, self._desk)

    def _review(self, config: WizardConfig) -> str | int:
        self._title(len(_STEPS), "review")
        self._desk.say(config.to_yaml())
        errors, warnings = config.validate(self._desk.look().hardware)
        self._desk.tell(errors)
        self._desk.tell(warnings, style="yellow")
        changes = [Choice(n, f"change {title}") for n, (title, _) in enumerate(_STEPS)]
        # Answers are checked one by one, but only together may some contradict.
        write = [] if errors else [Choice(_WRITE, "write it")]
        return self._desk.prompter.select(
            "What now?", [*write, *changes, Choice(_LEAVE, "leave, and write nothing")], _WRITE
        )

    def _title(self, number: int, title: str) -> None:
        self._desk.say(f"\nStep {number + 1} of {len(_STEPS) + 1}: {title}", style="bold")
