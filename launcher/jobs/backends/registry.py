"""The job back ends by name. A new one is a subclass of `JobBackend`.

A package adds its own by an entry point in the group `launcher.job_backends`, a script by `register_backend`.
"""

from __future__ import annotations

import functools

from launcher.core.errors import QueueError
from launcher.jobs.backends.base import JobBackend
from launcher.jobs.backends.local import LocalBackend
from launcher.jobs.backends.slurm import SlurmBackend
from strategies.entry_points import load_entry_points

ENTRY_POINTS = "launcher.job_backends"
_BACKENDS: dict[str, JobBackend] = {backend.name: backend for backend in (SlurmBackend(), LocalBackend())}


def register_backend(backend: JobBackend) -> None:
    """Add a back end; it replaces one of the same name."""
    _BACKENDS[backend.name] = backend


def unregister_backend(name: str) -> None:
    """Remove a back end."""
    del _BACKENDS[name]


def list_backends() -> tuple[JobBackend, ...]:
    """All back ends; the default one first."""
    _load_installed()
    return tuple(_BACKENDS.values())


def find_backend(name: object) -> JobBackend:
    """The back end of a name.

    Raises:
        QueueError: no back end has it.
    """
    broken = _load_installed() if str(name) not in _BACKENDS else {}
    backend = _BACKENDS.get(str(name))
    if backend is None:
        reason = f" ({broken[str(name)]})" if str(name) in broken else ""
        raise QueueError(f"unknown job back end {name!r}{reason}; valid are {', '.join(_BACKENDS)}")
    return backend


@functools.cache
def _load_installed() -> dict[str, str]:
    """Add the back ends of other packages; returns those that cannot be loaded, with the reason."""
    loaded, broken = load_entry_points(ENTRY_POINTS, JobBackend)
    for backend in loaded:
        _BACKENDS.setdefault(backend.name, backend)
    return broken
