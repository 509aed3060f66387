"""Import a class that a config names, and describe why one cannot be used."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from launcher.core.distribution import OWN_PACKAGES
from launcher.core.errors import ConfigError, Problem
from launcher.user_code.import_watch import ExitCallError, note_import


def import_class(path: str, base: type[Any] | tuple[type[Any], ...], field: str) -> type[Any]:
    """Import the class at a path, or find the only subclass of `base` with that short name, as LightningCLI does.

    Args:
        path: `pkg.module.Class`, or `Class` if it is imported already.
        base: the required base class or classes.
        field: the setting that names the class.

    Raises:
        ConfigError: it does not import, is ambiguous, or is not a subclass of `base`.
    """
    bases = base if isinstance(base, tuple) else (base,)
    kind = " or ".join(each.__name__ for each in bases)
    if "." not in path:
        return _by_short_name(path, bases, kind, field)
    module_name, _, name = path.rpartition(".")
    note_import(path)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may raise any error
        advice = _similar_module(error) or "correct the module, or give another path"
        message = _hidden_package(error) or f"{path} does not import: {describe_import_error(error)}; {advice}"
        raise ConfigError([Problem(field, message)]) from error
    found = getattr(module, name, None)
    if found is None:
        where = getattr(module, "__file__", None) or "a folder without __init__.py"
        # The file of a library is of no use to the user.
        place = "" if "site-packages" in where else f" the module is {where}:"
        message = _hidden_folder(module_name.partition(".")[0]) or (
            f"module {module_name} has no {name};{place} {_similar_class(name, module, bases)}"
        )
        raise ConfigError([Problem(field, message)])
    if not (inspect.isclass(found) and issubclass(found, bases)):
        message = foreign_lightning(found) or f"{path} is not a {kind}; it is {_describe(found)}: give a {kind}"
        raise ConfigError([Problem(field, message)])
    return found


def _similar_class(name: str, module: ModuleType, bases: tuple[type[Any], ...]) -> str:
    """The advice for a name that a module does not have."""
    classes = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, bases)]
    close = difflib.get_close_matches(name, classes, n=1)
    return f"did you mean {close[0]}?" if close else "correct the name"


def _similar_module(error: BaseException) -> str | None:
    """The advice for a misspelt module of the current folder; None if there is no similar one."""
    name = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if not isinstance(name, str) or "." in name:
        return None
    here = [file.stem for file in Path.cwd().iterdir() if file.suffix == ".py" or (file / "__init__.py").exists()]
    close = difflib.get_close_matches(name, here, n=1)
    return f"did you mean {close[0]}?" if close else None


def foreign_lightning(found: Any) -> str | None:
    """Advice for a class or object of the separate package `pytorch_lightning`; None for other packages."""
    cls = found if inspect.isclass(found) else type(found)
    old = next((each for each in cls.__mro__ if each.__module__.partition(".")[0] == "pytorch_lightning"), None)
    if old is None:
        return None
    return (
        f"{cls.__module__}.{cls.__name__} is a {old.__name__} of the package pytorch_lightning, and the launcher "
        f"uses the package lightning, which has the same class: in {cls.__module__}, import `lightning.pytorch` "
        "instead of `pytorch_lightning`"
    )


def _by_short_name(name: str, bases: tuple[type[Any], ...], kind: str, field: str) -> type[Any]:
    found = {
        cls
        for base in bases
        for cls in _subclasses(base)
        if cls.__name__ == name
        and cls.__module__.partition(".")[0] not in ("launcher", "pytorch_lightning")
        # Not a class from before its module was reloaded.
        and getattr(sys.modules.get(cls.__module__), name, None) is cls
    }
    # LightningCLI's own ReduceLROnPlateau has precedence over torch's, its base class.
    found = {base for base in bases if base.__name__ == name} or found
    if len(found) == 1:
        return found.pop()
    if found:
        paths = ", ".join(sorted(f"{cls.__module__}.{cls.__name__}" for cls in found))
        raise ConfigError([Problem(field, f"{name} is ambiguous: {paths}; give one of these paths")])
    similar = _similar_short_name(name, bases)
    advice = f"did you mean {similar}? Or give its" if similar else "give its"
    message = f"given {name!r}, and no imported {kind} has that name; {advice} import path, such as my_pkg.{name}"
    raise ConfigError([Problem(field, message)])


def _similar_short_name(name: str, bases: tuple[type[Any], ...]) -> str | None:
    """An imported class with a similar name, or a longer one: 'csv' is CSVLogger, 'early_stopping' EarlyStopping."""
    names = {
        cls.__name__.lower(): cls.__name__
        for base in bases
        for cls in _subclasses(base)
        if not cls.__name__.startswith("_") and cls.__module__.startswith(("lightning.", "torch."))
    }
    typed = name.lower().replace("_", "")
    longer = sorted((each for each in names if len(typed) > 2 and each.startswith(typed)), key=len)
    close = difflib.get_close_matches(typed, names, n=1, cutoff=0.7) or longer
    return names[close[0]] if close else None


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for each in type.__subclasses__(cls):
        yield each
        yield from _subclasses(each)


def _hidden_package(error: BaseException) -> str | None:
    """The message if a module of the user was searched in a package of the launcher with the same name."""
    # `import strategies` gets the launcher's package, and then an attribute is missing.
    module = error.obj if isinstance(error, AttributeError) else None
    name = getattr(module, "__name__", None) if isinstance(module, ModuleType) else None
    name = error.name if isinstance(error, ImportError) else name
    return _hidden_folder(name.partition(".")[0]) if isinstance(name, str) else None


def _hidden_folder(package: str) -> str | None:
    if package not in OWN_PACKAGES:
        return None
    own = Path(str(sys.modules[package].__file__)).parent
    for folder in map(Path, sys.path):
        for place in (folder / package, folder / f"{package}.py"):
            if place.exists() and not (place.is_dir() and place.resolve() == own.resolve()):
                return (
                    f"{place} has the name of one of the launcher's own packages, so its modules cannot be "
                    "imported: rename it, and correct its imports"
                )
    return None


def describe_import_error(error: BaseException) -> str:
    """The last line of an error that an import raised, which has its message, and its place."""
    is_call = isinstance(error, ExitCallError)
    last = str(error) if is_call else traceback.format_exception_only(error)[-1].strip()
    return f"{last}{_place(error)}"


def _place(error: BaseException) -> str:
    """The location of the error in the user's code, as ' (file, line n)'."""
    if isinstance(error, SyntaxError):
        return f" ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    while isinstance(error, SystemExit) and len(frames) > 1 and frames[-1].name in ("exit", "report_exit"):
        # W&B and other libraries replace sys.exit by their own function, and the launcher os._exit.
        frames.pop()
    where = frames[-1]
    return "" if where.filename.startswith("<frozen") else f" ({where.filename}, line {where.lineno})"


def _describe(found: Any) -> str:
    if not inspect.isclass(found):
        return f"of type {type(found).__name__}"
    bases = ", ".join(base.__name__ for base in found.__mro__[1:-1])
    return f"a subclass of {bases}" if bases else "a class without a base class"
