"""A prompter with prepared answers, for tests of interactive commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.wizard.prompter import Choice

# Accept the default.
DEFAULT = object()


class ScriptedPrompter:
    """Answers each question by the start of its message; a list is used in order, its last answer repeatedly.

    Attributes:
        asked: message and default of each question, in order.
    """

    def __init__(self, **answers: Any) -> None:
        self._answers = {key: list(v) if isinstance(v, list) else [v] for key, v in answers.items()}
        self.asked: list[tuple[str, Any]] = []
        self.titles: dict[str, list[str]] = {}

    def text(self, message: str, default: str = "") -> str:
        return self._answer(message, default)

    def select(self, message: str, choices: Sequence[Choice], default: Any = None) -> Any:
        values = [choice.value for choice in choices]
        self.titles[message] = [choice.title for choice in choices]
        answer = self._answer(message, default if default in values else values[0])
        assert answer in values, f"{message}: {answer!r} is none of {values}"
        return answer

    def confirm(self, message: str, default: bool = True) -> bool:
        return self._answer(message, default)

    def _answer(self, message: str, default: Any) -> Any:
        self.asked.append((message, default))
        assert len(self.asked) < 100, f"the same is asked again and again: {self.asked[-5:]}"
        key = next((k for k in self._answers if message.startswith(k.replace("_", " "))), None)
        if key is None:
            return default
        answers = self._answers[key]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return default if answer is DEFAULT else answer
