"""Runs mutmut's mutants, in its folder `mutants`: `python -m tests.support.mutant_loop [PREFIX ...]`.

mutmut starts pytest for each mutant. This loop collects the tests once and runs each mutant in a
fork of that process, which runs the tests that reach the mutated function, quickest first, until one
fails. Results are written to mutmut's files, so that `mutmut results` and `mutmut show` can read them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

# mutmut's codes (mutmut/stats.py).
_SURVIVED, _KILLED, _NO_TESTS, _TIMEOUT = 0, 1, 33, 36
# Seconds on top of ten times the duration without a mutant.
_PATIENCE = 20


class MutantLoop:
    """A pytest plugin in place of the loop over the tests.

    Args:
        prefixes: names of mutants begin with one of them; all without any.
    """

    def __init__(self, prefixes: tuple[str, ...]) -> None:
        self._prefixes = prefixes
        stats = json.loads(Path("mutmut-stats.json").read_text())
        self._tests: dict[str, list[str]] = stats["tests_by_mangled_function_name"]
        self._seconds: dict[str, float] = stats["duration_by_test"]
        self._failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed |= report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for file in sorted(Path().rglob("*.py.meta")):
            meta = json.loads(file.read_text())
            codes = meta["exit_code_by_key"]
            for name, known in codes.items():
                if known is None and name.startswith(self._prefixes):
                    codes[name] = self._try(name, items)
                    print(name, codes[name], flush=True)
                    file.write_text(json.dumps(meta, indent=4))
        return True

    def _try(self, name: str, items: dict[str, pytest.Item]) -> int:
        reached = [test for test in self._tests.get(name.rpartition("__mutmut_")[0], ()) if test in items]
        if not reached:
            return _NO_TESTS
        reached.sort(key=lambda test: self._seconds.get(test, 0))
        child = os.fork()
        if child == 0:
            code = _KILLED
            try:
                # Hide the output of pytest and the tests.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.environ["MUTANT_UNDER_TEST"] = name
                code = self._run([items[test] for test in reached])
            finally:
                os._exit(code)
        return self._wait(child, _PATIENCE + 10 * sum(self._seconds.get(test, 0) for test in reached))

    def _run(self, items: list[pytest.Item]) -> int:
        for item in items:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if self._failed:
                return _KILLED
        return _SURVIVED

    def _wait(self, child: int, seconds: float) -> int:
        """The child's exit code; a child that does not end in time is killed."""

        def give_up(*_: Any) -> None:
            os.kill(child, signal.SIGKILL)

        signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        _, status = os.waitpid(child, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if os.WIFSIGNALED(status):
            return _TIMEOUT if os.WTERMSIG(status) == signal.SIGKILL else -os.WTERMSIG(status)
        return os.WEXITSTATUS(status)


def main() -> None:
    """Run the mutants."""
    settings = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["mutmut"]
    os.environ["MUTANT_UNDER_TEST"] = ""
    arguments = [*settings["pytest_add_cli_args"], *settings["pytest_add_cli_args_test_selection"]]
    loop = MutantLoop(tuple(sys.argv[1:]) or ("",))
    sys.exit(pytest.main([*arguments, "-q", "--capture=no", "--rootdir=."], plugins=[loop]))


if __name__ == "__main__":
    main()
