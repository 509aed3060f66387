"""Publishes what a process is doing for the ranks that wait for it and for the user."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# An activity that lasts longer than this many seconds is reported to the user.
_NOTICE_AFTER = 10.0
_INTERVAL = 1.0
_activities: list[str] = []


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Name what the block does, as in 'rank 0 is <what>'."""
    _activities.append(what)
    try:
        yield
    finally:
        _activities.pop()


def current_activity() -> str:
    """The innermost activity; empty without one."""
    with suppress(IndexError):  # another thread may have ended it
        return _activities[-1]
    return ""


class SlowActivityNotice:
    """Reports an activity that lasts long, once; `{}` in `template` stands for the activity."""

    def __init__(self, notify: Callable[[str], None], template: str) -> None:
        self._notify, self._template = notify, template
        self._activity = ""
        self._since = time.monotonic()
        self._is_reported = False

    def observe(self, activity: str) -> None:
        """Record the current activity."""
        now = time.monotonic()
        if activity != self._activity:
            self._activity, self._since, self._is_reported = activity, now, False
        elif activity and not self._is_reported and now - self._since >= _NOTICE_AFTER:
            self._is_reported = True
            self._notify(self._template.format(activity))


class ActivityReporter:
    """Publishes in a store that this process is alive and what it does, while the `with` block lasts.

    Without a store it publishes nothing. The others give up after `patience` seconds without an update.
    """

    def __init__(self, store: Any, key: str, notify: Callable[[str], None], patience: float) -> None:
        self._store, self._key = store, key
        self._notice = SlowActivityNotice(notify, "planning takes a while: rank 0 is {}")
        self._interval = min(_INTERVAL, patience / 4)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._publish, name="launcher-activity", daemon=True)

    def __enter__(self) -> ActivityReporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        # A thread that is still inside the store's C++ code when Python ends aborts the process.
        self._thread.join()

    def _publish(self) -> None:
        # Without the store no process waits any longer; the main thread gets the same error.
        with suppress(RuntimeError):
            client = None if self._store is None else self._store.clone()
            count = 0
            while not self._ended.wait(self._interval):
                count += 1
                activity = current_activity()
                if client is not None:
                    client.set(self._key, json.dumps({"count": count, "doing": activity}))
                self._notice.observe(activity)


class ActivityWatch:
    """Checks whether a process with an `ActivityReporter` is alive, by its entry `key` in the store."""

    def __init__(self, store: Any, key: str, notify: Callable[[str], None]) -> None:
        self._store, self._key = store, key
        self._notice = SlowActivityNotice(notify, "waiting for rank 0, which is {}")
        self._count = 0
        self.activity = ""

    def has_update(self) -> bool:
        """Whether the process has published anything since the last call."""
        if not self._store.check([self._key]):
            return False
        entry = json.loads(self._store.get(self._key))
        is_new = entry["count"] != self._count
        self._count, self.activity = entry["count"], entry["doing"]
        self._notice.observe(self.activity)
        return is_new
