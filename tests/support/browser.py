"""A real headless Chromium for tests, controlled over a pipe: page contents, console messages, network requests."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str:
    """Path of the program; without it a test is skipped on a developer's machine and fails in CI."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        reason = "needs Chromium: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Page:
    """One open page.

    Attributes:
        complaints: messages on the browser's console, and uncaught errors.
        requests: addresses that the page requested, including its own.
    """

    def __init__(self, to_browser: int, from_browser: int, timeout: float) -> None:
        self._out, self._in = to_browser, from_browser
        self._timeout = timeout
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self._seen: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def open(self, file: Path) -> None:
        """Load a file and wait for it."""
        self._session = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Page.navigate", url=file.absolute().as_uri())
        self._until(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def show_as(self, scheme: str = "light", media: str = "", width: int = 1200) -> None:
        """Emulate a color scheme ('light' or 'dark'), a medium ('print') and a window width."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[feature])
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def screenshot(self, file: Path) -> None:
        """The whole page as PNG."""
        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def print(self, file: Path) -> None:
        """The page as PDF."""
        data = self.ask("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run one command of the DevTools protocol and return its result."""
        self._count += 1
        own = self._count
        message = {"id": own, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda message: message.get("id") == own)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _until(self, wanted: Any) -> dict[str, Any]:
        for message in self._seen:
            if wanted(message):
                self._seen.clear()
                return message
        end = time.monotonic() + self._timeout
        while True:
            message = self._next(end)
            self._note(message)
            if wanted(message):
                return message
            self._seen.append(message)

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(end - time.monotonic(), 0))
            assert ready, f"Chromium did not answer within {self._timeout} s; last: {self._seen[-3:]}"
            read = os.read(self._in, 1 << 20)
            assert read, f"Chromium has ended; last: {self._seen[-3:]}"
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str([a.get("value") for a in parameters["args"]]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])


@contextlib.contextmanager
def browser(profile: Path, timeout: float = 90) -> Iterator[Page]:
    """A new browser, ended with the context.

    Args:
        profile: a new folder for its files.
        timeout: seconds for each answer.
    """
    to_child, to_browser = os.pipe()
    from_browser, from_child = os.pipe()
    # The protocol uses descriptors 3 and 4 in the browser.
    script = f'exec 5<&{to_child} 6>&{from_child}; exec 3<&5 4>&6; exec "$@" 5<&- 6>&-'
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={profile}"]  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", find_chromium(), *options],
        pass_fds=(to_child, from_child),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(profile)},
        start_new_session=True,
    )
    os.close(to_child)
    os.close(from_child)
    page = Page(to_browser, from_browser, timeout)
    try:
        yield page
    finally:
        with contextlib.suppress(OSError):
            os.close(to_browser)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        os.close(from_browser)
