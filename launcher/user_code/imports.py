"""Import a class that a config names, and say in words what is wrong with one that cannot be used."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.core.distribution import OWN_PACKAGES
from launcher.core.errors import ConfigError, Problem


def import_class(path: str, base: type[Any] | tuple[type[Any], ...], field: str) -> type[Any]:
    """The class at an import path, or the one subclass of `base` of that short name, as LightningCLI finds it.

    Args:
        path: `pkg.module.Class`, or `Class` if it is imported already.
        base: what it must be a subclass of.
        field: its place in the config.

    Raises:
        ConfigError: it does not import, is ambiguous, or is of another kind.
    """
    bases = base if isinstance(base, tuple) else (base,)
    kind = " or ".join(each.__name__ for each in bases)
    if "." not in path:
        return _by_short_name(path, bases, kind, field)
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # The user's module may raise anything; the last line is what it says.
        last = traceback.format_exception_only(error)[-1].strip()
        message = _hidden_package(error) or (
            f"{path} does not import: {last}{_place(error)}; correct that, or give another path"
        )
        raise ConfigError([Problem(field, message)]) from error
    found = getattr(module, name, None)
    if found is None:
        hidden = _hidden_folder(module_name.partition(".")[0])
        where = getattr(module, "__file__", None) or "a folder without __init__.py"
        raise ConfigError(
            [Problem(field, hidden or f"module {module_name} has no {name}; it lies in {where}: correct the name")]
        )
    if not (inspect.isclass(found) and issubclass(found, bases)):
        message = foreign_lightning(found) or f"{path} is no {kind}; it is {_what(found)}: give a {kind}"
        raise ConfigError([Problem(field, message)])
    return found


def foreign_lightning(found: Any) -> str | None:
    """What to import instead, if a class or an object is made of the separate package `pytorch_lightning`."""
    cls = found if inspect.isclass(found) else type(found)
    old = next((each for each in cls.__mro__ if each.__module__.partition(".")[0] == "pytorch_lightning"), None)
    if old is None:
        return None
    return (
        f"{cls.__module__}.{cls.__name__} is a {old.__name__} of the package pytorch_lightning, and the launcher "
        f"trains with the package lightning, which has the same: in {cls.__module__}, write `lightning.pytorch` "
        "instead of `pytorch_lightning`"
    )


def _by_short_name(name: str, bases: tuple[type[Any], ...], kind: str, field: str) -> type[Any]:
    found = {
        cls
        for base in bases
        for cls in _subclasses(base)
        if cls.__name__ == name
        and cls.__module__.partition(".")[0] not in ("launcher", "pytorch_lightning")
        # Not one that an older version of its module has left.
        and getattr(sys.modules.get(cls.__module__), name, None) is cls
    }
    # LightningCLI's own ReduceLROnPlateau before torch's, which it is a class of.
    found = {base for base in bases if base.__name__ == name} or found
    if len(found) == 1:
        return found.pop()
    if found:
        paths = ", ".join(sorted(f"{cls.__module__}.{cls.__name__}" for cls in found))
        raise ConfigError([Problem(field, f"{name} may be any of {paths}; give the whole path")])
    message = f"given {name!r}, and no imported {kind} has that name; give its import path, as my_pkg.{name}"
    raise ConfigError([Problem(field, message)])


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for each in type.__subclasses__(cls):
        yield each
        yield from _subclasses(each)


def _hidden_package(error: BaseException) -> str | None:
    """In words, if a module of the user's was looked for in a package of the launcher's with the same name."""
    name = getattr(error, "name", None) if isinstance(error, ImportError) else None
    return _hidden_folder(name.partition(".")[0]) if isinstance(name, str) else None


def _hidden_folder(package: str) -> str | None:
    if package not in OWN_PACKAGES:
        return None
    own = Path(str(sys.modules[package].__file__)).parent
    for folder in map(Path, sys.path):
        for place in (folder / package, folder / f"{package}.py"):
            if place.exists() and not (place.is_dir() and place.resolve() == own.resolve()):
                return (
                    f"{place} has the name of one of the launcher's own packages, so its modules cannot be imported "
                    "beside it: rename it, and correct the imports of it"
                )
    return None


def _place(error: BaseException) -> str:
    """Where in the user's code it happened, as ' (file, line n)'."""
    if isinstance(error, SyntaxError):
        return f" ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    while isinstance(error, SystemExit) and len(frames) > 1 and frames[-1].name == "exit":
        # W&B, and whoever else, puts a function of its own in the place of sys.exit.
        frames.pop()
    where = frames[-1]
    return "" if where.filename.startswith("<frozen") else f" ({where.filename}, line {where.lineno})"


def _what(found: Any) -> str:
    if inspect.isclass(found):
        return (
            "a class of " + ", ".join(b.__name__ for b in found.__mro__[1:-1])
            if len(found.__mro__) > 2
            else "a bare class"
        )
    return f"a {type(found).__name__}"
