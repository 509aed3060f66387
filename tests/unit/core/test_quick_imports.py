"""The collector rests while modules are imported, and only then."""

from __future__ import annotations

import gc

import pytest

from launcher.core.gc_paused import quick_imports


def test_the_collector_is_disabled_in_the_block_and_enabled_after_it() -> None:
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_a_disabled_collector_stays_disabled() -> None:
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_collector_is_enabled_after_a_failed_import() -> None:
    with pytest.raises(ImportError), quick_imports():
        raise ImportError("no such thing")
    assert gc.isenabled()
