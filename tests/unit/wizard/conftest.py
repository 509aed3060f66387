"""The wizard reads the user's classes anew at each answer, which other tests must not notice."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _same_modules() -> Iterator[None]:
    """Modules that the wizard has removed are those that other test modules have imported."""
    before = dict(sys.modules)
    yield
    sys.modules.update(before)
