"""One question of the wizard, which is asked until its answer is valid."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from launcher.config.schema import RunConfig
from launcher.core.errors import Problem
from launcher.core.yaml_loader import Loader
from launcher.wizard.answers import WizardConfig
from launcher.wizard.session import WizardSession

_Part = Literal["model", "data"]


@dataclass(frozen=True, slots=True)
class ValueQuestion:
    """A question for one value.

    Attributes:
        default: the answer that keeps the default of the config; an empty line gives it.
        is_text: whether digits stay text.
        most: largest number; None for no limit.
        limit: what `most` is.
    """

    name: str
    message: str
    default: str = ""
    is_text: bool = False
    most: int | None = None
    limit: str = ""


def ask_class(config: WizardConfig, session: WizardSession, part: _Part, message: str) -> WizardConfig:
    """Import path, then arguments; asks each until it is valid."""
    typed = getattr(config, part) or ""
    while True:
        typed = session.prompter.text(message, typed).strip()
        if not typed:
            return config.with_answers(**{part: None, f"{part}_args": None})
        given = getattr(config, f"{part}_args") if typed == getattr(config, part) else None
        config_with = config.with_answers(**{part: typed, f"{part}_args": given})
        errors = _find_errors(part, typed)
        if not errors:
            session.show(f"importing {typed} ...", style="dim")
            # Here: it imports Lightning, which takes seconds.
            from launcher.user_code.inspection import class_problems

            problems = class_problems(_only_classes(config_with), part)
            errors = [p for p in problems if p.path == f"{part}.class_path"]
        if errors:
            session.show_problems(errors)
            continue
        from launcher.user_code.inspection import signature_of

        session.show(f"  {signature_of(typed)}", style="dim")
        answered = _ask_arguments(config_with, session, part)
        if answered is not None:
            return answered


def _ask_arguments(config: WizardConfig, session: WizardSession, part: _Part) -> WizardConfig | None:
    """Arguments of the constructor; None if the user wants to name another class."""
    from launcher.user_code.inspection import ModelCountError, class_problems, count_parameters

    given = getattr(config, f"{part}_args")
    typed = json.dumps(given, ensure_ascii=False) if given else ""
    while True:
        typed = session.prompter.text("Its arguments, as in lr: 1e-4, width: 8 (empty: defaults)", typed).strip()
        try:
            arguments = _parse_arguments(typed)
        except ValueError as error:
            session.show(f"  {error}", style="red")
            continue
        candidate = config.with_answers(**{f"{part}_args": arguments or None})
        problems = class_problems(_only_classes(candidate), part)
        if problems:
            session.show_problems(problems)
            continue
        if part == "data":
            return candidate
        try:
            session.show(f"  {count_parameters(_only_classes(candidate))}", style="green")
        except ModelCountError as error:
            session.show(f"  {error}", style="yellow")
            if not session.prompter.confirm("Its parameters cannot be counted. Keep it?", default=False):
                return None
        return candidate


def _parse_arguments(text: str) -> Mapping[str, Any]:
    try:
        values = yaml.load(text if text.startswith("{") else f"{{{text}}}", Loader)  # noqa: S506 -- a SafeLoader
    except (yaml.YAMLError, ValueError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(k, str) and k.isidentifier() for k in values):
        raise ValueError(f"given {text!r}; expected arguments as in lr: 1e-4, width: 8")
    if any(value is None for value in values.values()) and "null" not in text and "~" not in text:
        raise ValueError(f"given {text!r}; expected a value after each name, as in lr: 1e-4")
    return values


def ask_value(config: WizardConfig, session: WizardSession, question: ValueQuestion) -> WizardConfig:
    """One value; asks until it is valid. An empty text is no answer."""
    name, most = question.name, question.most
    current = getattr(config, name)
    # A default in the line would have to be deleted before another answer is typed.
    typed = "" if current in (None, question.default) else str(current)
    while True:
        typed = session.prompter.text(question.message, typed).strip()
        is_number = typed.lstrip("-").isdecimal() and not question.is_text
        value: Any = int(typed) if is_number else typed or question.default or None
        errors = _find_errors(name, value)
        if most is not None and isinstance(value, int) and value > most:
            errors.append(Problem(name, f"given {value}; expected at most {most}: the {question.limit}"))
        if not errors:
            return with_answer(config, name, value, default=question.default)
        session.show_problems(errors)


def with_answer(config: WizardConfig, name: str, value: Any, *, default: Any) -> WizardConfig:
    """The config with one answer. One that only confirms the default or the preset is not stored."""
    current = getattr(config, name)
    is_same = value == current or (current is None and value == default)
    return config if is_same else config.with_answers(**{name: value})


def _find_errors(name: str, value: Any) -> list[Problem]:
    """Problems of one answer alone."""
    return [problem for problem in WizardConfig(**{name: value}).errors() if problem.path == name]


def _only_classes(config: WizardConfig) -> RunConfig:
    """A config with only the classes of the answers, to import them."""
    values = config.values()
    return RunConfig(model=values.get("model"), data=values.get("data"))
