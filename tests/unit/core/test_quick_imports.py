"""The collector rests while modules are imported, and only then."""

from __future__ import annotations

import gc

import pytest

from launcher.core.gc_paused import quick_imports


def test_the_collector_rests_inside_and_works_again_after() -> None:
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), quick_imports():
        raise ImportError("no such thing")
    assert gc.isenabled()
