"""Fixtures of several packages."""

from __future__ import annotations

import sys

import pytest

from tests.support.wandb_stand_in import RecordingWandb


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> RecordingWandb:
    """In place of the module `wandb`."""
    stand_in = RecordingWandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in
