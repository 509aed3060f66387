"""Digests of the user's source files, for ranks to compare their code."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import site
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from launcher.core.distribution import OWN_PACKAGES

# The launcher's own packages, whose version is compared; the user's folder may have packages of these names.
_OWN = Path(__file__).resolve().parents[2]
_OWN_PACKAGES = tuple(str(_OWN / name) + os.sep for name in OWN_PACKAGES)
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
# Written by build tools: two nodes may have installed the same commit at different times.
_GENERATED = ("_version.py", "__version__.py", "version.py", "_build_info.py")
# Of a package with more files than this, only imported files are compared.
_MOST_FILES = 2000


def user_sources(modules: Mapping[str, ModuleType | None]) -> dict[str, str]:
    """The digest of each source file of the user, by the same name on all nodes: {"my_pkg/model.py": "0f3a..."}.

    `modules` is `sys.modules` after the user's classes are imported. A module is the user's if its file belongs neither
    to Python, nor to an installed package, nor to the launcher. All files of a package are compared, because ranks may
    import some later. Line ends and files that build tools write are ignored.
    """
    found: dict[str, Path] = {}
    for name, module in list(modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py") or _is_library(file):
            continue
        path = Path(file)
        found[_name_of(name, path)] = path
        if "." not in name and path.name == "__init__.py":
            found.update(_files_of(name, path.parent))
    return {name: digest for name, path in sorted(found.items()) if path.name not in _GENERATED
            and (digest := _digest(path)) is not None}  # fmt: skip


def digest_of(sources: Mapping[str, str]) -> str:
    """One digest of all source files."""
    return hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()[:16]


def differing(base: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Files that differ; a file that only one of the two has is ignored, as only that rank may import it."""
    return [name for name, digest in base.items() if other.get(name, digest) != digest]


def _name_of(module: str, path: Path) -> str:
    if module == "__main__":
        return path.name
    parts = module.split(".")
    return "/".join([*parts, path.name]) if path.name == "__init__.py" else "/".join([*parts[:-1], path.name])


def _files_of(package: str, folder: Path) -> dict[str, Path]:
    """A package's files, imported or not."""
    files = list(itertools.islice(_walk(folder), _MOST_FILES + 1))
    if len(files) > _MOST_FILES:
        return {}
    return {f"{package}/{file.relative_to(folder).as_posix()}": file for file in files}


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        # Hidden folders and virtual environments do not belong to the package.
        folders[:] = sorted(
            name for name in folders
            if not name.startswith((".", "__pycache__")) and not Path(parent, name, "pyvenv.cfg").exists()
        )  # fmt: skip
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(".py"))


@functools.cache
def _library_folders() -> tuple[str, ...]:
    paths = [sysconfig.get_paths().get(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = [*filter(None, paths), *site.getsitepackages(), site.getusersitepackages()]
    return tuple({form + os.sep for folder in folders for form in (folder, os.path.realpath(folder))})


def is_users_file(file: str) -> bool:
    """Whether code comes from the user rather than from Python, an installed package or the launcher."""
    is_made = file.startswith("<") and not file.startswith("<ipython")
    return not is_made and not _is_library(file)


@functools.cache
def _is_library(file: str) -> bool:
    library = _library_folders()
    if file.startswith(library) or any(name in file for name in _INSTALLED):
        return True
    # Last, as resolving links reads each folder.
    return os.path.realpath(file).startswith((*library, *_OWN_PACKAGES))


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()[:16]
    except OSError:
        return None  # removed since the import, or not readable: nothing to compare
