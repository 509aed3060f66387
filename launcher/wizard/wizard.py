"""`SetupWizard`: creates a config in five steps."""

from __future__ import annotations

import os
from collections.abc import Callable

from rich.console import Console

from launcher.core.errors import Problem
from launcher.core.terminal import make_console
from launcher.wizard import steps
from launcher.wizard.answers import WizardConfig
from launcher.wizard.machine import MachineFacts, detect_machine
from launcher.wizard.prompter import Choice, Prompter, hide_early_input, make_prompter
from launcher.wizard.session import WizardSession

_WRITE, _CANCEL = "write", "cancel"
_STEPS: tuple[tuple[str, Callable[[WizardConfig, WizardSession], WizardConfig]], ...] = (
    ("model and data", steps.ask_model_and_data),
    ("hardware and cluster", steps.ask_hardware),
    ("precision and strategy", steps.ask_precision_and_strategy),
    ("logging", steps.ask_logging),
)


class SetupWizard:
    """Asks for model and data, hardware, precision and strategy, and logging; then shows the config.

    Args:
        prompter: asks the questions; default: on the terminal of this process.
        console: shows everything else.
        look: reads facts of the machine; called once, when first needed.
    """

    def __init__(
        self,
        prompter: Prompter | None = None,
        *,
        console: Console | None = None,
        look: Callable[[], MachineFacts] = detect_machine,
    ) -> None:
        self._session = WizardSession(prompter or make_prompter(os.environ), console or make_console(), look)

    def run(self, start: WizardConfig | None = None) -> WizardConfig | None:
        """Ask all questions; writes nothing.

        Args:
            start: answers to start from; the user can change each.

        Returns:
            The answers, which are a valid config; None if the user cancelled at the review.

        Raises:
            KeyboardInterrupt: Ctrl-C at any question.
            EOFError: the input ended.
        """
        with hide_early_input(self._session.prompter):
            return self._ask_all(start or WizardConfig())

    def _ask_all(self, config: WizardConfig) -> WizardConfig | None:
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
        self._show_title(number, title)
        return ask(config, self._session)

    def _review(self, config: WizardConfig) -> str | int:
        self._show_title(len(_STEPS), "review")
        self._session.show(config.to_yaml())
        errors, warnings = config.validate(self._session.machine.hardware)
        self._session.show_problems(map(_with_key, errors))
        # The plan has shown its own notices, with the ranks after the colon.
        known = {notice.partition(":")[0] for notice in self._session.plan_notices}
        new = [warning for warning in warnings if warning.message.partition(":")[0] not in known]
        self._session.show_problems(map(_with_key, new), style="yellow")
        changes = [Choice(n, f"change {title}") for n, (title, _) in enumerate(_STEPS)]
        # Each answer was checked alone; here they may contradict each other.
        write = [] if errors else [Choice(_WRITE, "write the config")]
        cancel = Choice(_CANCEL, "cancel, and write nothing")
        return self._session.prompter.select("What now?", [*write, *changes, cancel], _WRITE)

    def _show_title(self, number: int, title: str) -> None:
        self._session.show(f"\nStep {number + 1} of {len(_STEPS) + 1}: {title}", style="bold")


def _with_key(problem: Problem) -> Problem:
    """The problem under the key of the file, which the review shows."""
    return Problem(WizardConfig.find_key(problem.path), problem.message)
