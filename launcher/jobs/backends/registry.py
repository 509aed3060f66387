"""The job back ends by name. A new one is a subclass of `JobBackend` and one call of `register_backend`."""

from __future__ import annotations

from launcher.core.errors import QueueError
from launcher.jobs.backends.base import JobBackend
from launcher.jobs.backends.local import LocalBackend
from launcher.jobs.backends.slurm import SlurmBackend

_BACKENDS: dict[str, JobBackend] = {backend.name: backend for backend in (SlurmBackend(), LocalBackend())}


def register_backend(backend: JobBackend) -> None:
    """Add a back end; it replaces one of the same name."""
    _BACKENDS[backend.name] = backend


def unregister_backend(name: str) -> None:
    """Remove a back end."""
    del _BACKENDS[name]


def list_backends() -> tuple[JobBackend, ...]:
    """All back ends; the default one first."""
    return tuple(_BACKENDS.values())


def find_backend(name: object) -> JobBackend:
    """The back end of a name.

    Raises:
        QueueError: no back end has it.
    """
    backend = _BACKENDS.get(str(name))
    if backend is None:
        raise QueueError(f"unknown job back end {name!r}; valid are {', '.join(_BACKENDS)}")
    return backend
