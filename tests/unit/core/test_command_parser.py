"""Errors about the value of an option with choices."""

from __future__ import annotations

import pytest

from launcher.core.command_parser import CommandParser
from launcher.core.errors import CommandLineError


@pytest.mark.parametrize(
    ("typed", "end"),
    [("slrum", "; did you mean slurm?"), ("SLURM", "; did you mean slurm?"), ("lo", "; did you mean local?"),
     ("cloud9", "; `tool --help` lists the options")],
)  # fmt: skip
def test_a_misspelt_choice_of_an_option_is_recognized(typed: str, end: str) -> None:
    parser = CommandParser("tool")
    parser.add_argument("--cluster", choices=["slurm", "local"])
    with pytest.raises(CommandLineError) as caught:
        parser.parse_args(["--cluster", typed])
    assert str(caught.value).startswith(f"--cluster: invalid choice: '{typed}' (choose from ")
    assert str(caught.value).endswith(end)
