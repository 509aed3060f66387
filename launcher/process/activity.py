"""What a process does that may take long, for those who wait for it: other ranks and the user."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

# Seconds of one activity until the user is told of it.
_NOTICE_AFTER = 10.0
_INTERVAL = 1.0
_activities: list[str] = []


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Name what is done inside, as in 'rank 0 is <what>'."""
    _activities.append(what)
    try:
        yield
    finally:
        _activities.pop()


def current_activity() -> str:
    """The innermost one, empty without one."""
    with suppress(IndexError):  # it may end between two looks
        return _activities[-1]
    return ""


class SlowActivity:
    """Tells of each activity that lasts long, once.

    Args:
        tell: given the text.
        words: the text, with `{}` in place of the activity.
    """

    def __init__(self, tell: Callable[[str], None], words: str) -> None:
        self._tell, self._words = tell, words
        self._seen = ""
        self._since = time.monotonic()
        self._told = False

    def see(self, activity: str) -> None:
        """Look at what is being done now."""
        now = time.monotonic()
        if activity != self._seen:
            self._seen, self._since, self._told = activity, now, False
        elif activity and not self._told and now - self._since >= _NOTICE_AFTER:
            self._told = True
            self._tell(self._words.format(activity))


class ActivityReporter:
    """Publishes in a store that this process lives and what it is doing, while the `with` block lasts.

    Args:
        store: shared with those who wait; None publishes nothing.
        key: where.
        tell: told of an activity that lasts long.
        patience: seconds without a sign after which the others give up.
    """

    def __init__(self, store: Any, key: str, tell: Callable[[str], None], patience: float) -> None:
        self._store, self._key = store, key
        self._slow = SlowActivity(tell, "planning takes a while: rank 0 is {}")
        self._interval = min(_INTERVAL, patience / 4)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._publish, name="launcher-activity", daemon=True)

    def __enter__(self) -> ActivityReporter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        # A thread that wakes inside the store's C++ code after Python has ended aborts the process.
        self._thread.join()

    def _publish(self) -> None:
        # Without the store nobody waits any more; the main thread finds that out, too.
        with suppress(RuntimeError):
            client = None if self._store is None else self._store.clone()
            count = 0
            while not self._ended.wait(self._interval):
                count += 1
                activity = current_activity()
                if client is not None:
                    client.set(self._key, json.dumps({"count": count, "doing": activity}))
                self._slow.see(activity)


class ActivityWatch:
    """Sees whether a process that reports its activity goes on living.

    Args:
        store: shared with it.
        key: where it reports.
        tell: told of an activity that lasts long.
    """

    def __init__(self, store: Any, key: str, tell: Callable[[str], None]) -> None:
        self._store, self._key = store, key
        self._slow = SlowActivity(tell, "waiting for rank 0, which is {}")
        self._count = 0
        self.activity = ""

    def has_moved(self) -> bool:
        """Whether there has been a sign of life since the last look."""
        if not self._store.check([self._key]):
            return False
        sign = json.loads(self._store.get(self._key))
        moved = sign["count"] != self._count
        self._count, self.activity = sign["count"], sign["doing"]
        self._slow.see(self.activity)
        return moved
