"""Finds secrets in plain values, by their key or form, and replaces them with references or `(hidden)`. Pure."""

from __future__ import annotations

import functools
import hashlib
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

HIDDEN = "(hidden)"
# Prefix of the variable for a secret that no other variable holds.
VARIABLE_PREFIX = "LAUNCHER_SECRET_"

_Path = tuple[str, ...]
_KEY_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# A key with one of these parts always has a secret value.
_STRONG = {"password", "passwords", "passwd", "pwd", "passphrase", "passcode", "secret", "secrets", "credential",
           "credentials", "creds", "apikey", "apikeys", "accesskey", "secretkey", "authtoken",
           "authorization"}  # fmt: skip
_STRONG_PAIRS = {
    (kind, of)
    for of in ("key", "keys", "token", "tokens")
    for kind in ("api", "access", "private", "auth", "account", "refresh", "bearer", "session", "signing", "encryption",
                 "ssh", "license", "hf", "hub", "wandb", "github", "gitlab", "openai", "aws", "azure")
}  # fmt: skip
# Last parts of a key that describe a secret, such as its file or size.
_ABOUT = {"file", "files", "path", "paths", "dir", "folder", "env", "var", "variable", "name", "names", "length", "len",
          "dim", "size", "type", "types", "count", "num", "field", "column", "policy", "prefix", "ttl",
          "expiry"}  # fmt: skip
# Parts before 'token' in the names of symbols and counts of language models.
_SYMBOLS = {"pad", "padding", "bos", "eos", "mask", "masked", "cls", "sep", "unk", "unknown", "oov", "special", "image",
            "video", "audio", "text", "start", "end", "stop", "begin", "per", "each", "next", "first", "last", "prompt",
            "class", "register", "query", "prefix", "suffix", "eot", "eod", "sos", "go", "blank", "additional", "num",
            "n", "max", "min", "total", "sub", "word", "dist", "distillation", "label", "separator", "new", "added",
            "extra", "input", "output", "target"}  # fmt: skip
# Parts before 'key' in the names of entries of a batch, a table or a state.
_ENTRIES = {"label", "image", "img", "target", "input", "output", "batch", "text", "data", "feature", "features",
            "sort", "group", "index", "id", "join", "metric", "monitor", "loss", "score", "state", "dict", "value",
            "mask", "time", "sample", "item", "class", "column", "source", "src", "tgt", "dst", "node", "edge", "graph",
            "x", "y", "pred", "prediction", "caption", "audio", "video", "map", "cond", "query"}  # fmt: skip
_SYMBOL = re.compile(r"[<\[|].*[>\]|]", re.DOTALL)
# A column, a metric or an entry of a batch, as in `label_key`, `keys` and `monitor_key`; or `auth: basic`.
_ENTRY = re.compile(r"(?=.{1,40}$)[a-z]+([_./ -][a-z]+)*[_-]?\d{0,2}")
_IN_URL = re.compile(
    r"\b[a-z][a-z0-9+.-]*://(?:[^\s/@:]*:[^\s/@]+|[^\s/@:]{20,})@"
    r"|[?&](?:[\w-]*(?:token|secret|password|signature|credential)|(?:api|access)[_-]?key|key|sig)=[^\s&]",
    re.IGNORECASE,
)
_REFERENCE = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)\}")
# A shorter secret may occur in any text by chance.
_SHORTEST_IN_TEXT = 4


def redact(values: Any) -> Any:
    """The same plain values with `HIDDEN` in place of each secret or reference to one."""
    return _changed(values, lambda path, value, named: HIDDEN)


def without_secrets(values: Any) -> Any:
    """The same plain values without secrets and their keys."""
    return _without(redact(values))


def find_secrets(values: Any) -> dict[str, Any]:
    """Dotted path to value of every secret in plain values; references are not included."""
    return {".".join(path): value for path, value, _ in _list_secrets(values)}


def digests(values: Any) -> dict[str, str]:
    """Dotted path to a digest of every secret, by which ranks compare secrets without showing them."""
    return {path: hashlib.sha256(f"{path}={value}".encode()).hexdigest()[:16]
            for path, value in find_secrets(values).items()}  # fmt: skip


def references(values: Any, env: Mapping[str, str]) -> dict[str, str]:
    """Variable to value of every secret in plain values; `resolve_references` needs these variables.

    A variable of `env` is used if it has a secret's name and value.
    """
    return {_variable(path, value, named, env): str(value) for path, value, named in _list_secrets(values)}


def with_references(values: Any, env: Mapping[str, str]) -> Any:
    """The same plain values with `${oc.env:NAME}` in place of each secret, for a file."""

    def refer(path: _Path, value: Any, named: bool) -> Any:
        return value if _variable_of(value) else f"${{oc.env:{_variable(path, value, named, env)}}}"

    return _changed(values, refer)


def resolve_references(values: Any, env: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """The inverse of `with_references`; also returns dotted path to variable of every secret that is not set."""
    missing: dict[str, str] = {}

    def resolve(path: _Path, value: Any, named: bool) -> Any:
        del named
        name = _variable_of(value)
        if name is not None and not env.get(name):
            missing[".".join(path)] = name
        return value if name is None else env.get(name, value)

    return _changed(values, resolve), missing


def hide_in_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without the values of `--some.token VALUE` and `--some.token=VALUE`."""
    shown: list[str] = []
    option = ""
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if argument.startswith("--"):
            shown.append(f"{key}={_shown(key, text)}" if equals else argument)
        else:
            shown.append(_shown(option, argument))
        option = argument if argument.startswith("--") and not equals else ""
    return shown


def _shown(key: str, text: str) -> str:
    return str(redact({key.lstrip("-"): text})[key.lstrip("-")])


def scrub(text: str, secrets: Iterable[Any]) -> str:
    """A text without these values, for error messages."""
    spelt = {text for each in secrets for text in (str(each), repr(str(each))[1:-1])}
    for secret in sorted(spelt, key=len, reverse=True):
        if len(secret) >= _SHORTEST_IN_TEXT:
            text = text.replace(secret, HIDDEN)
    return text


@functools.lru_cache(maxsize=4096)
def _strength(name: str) -> int:
    """2: always a secret, 1: depends on the value, 0: no secret."""
    parts = [part.lower() for part in _KEY_PART.findall(name)]
    while parts and (parts[-1].isdigit() or parts[-1] in ("value", "string", "str")):
        parts.pop()
    if parts[-3:] == ["access", "key", "id"]:
        return 2
    if not parts or parts[-1] in _ABOUT:
        return 0
    if _STRONG & set(parts) or tuple(parts[-2:]) in _STRONG_PAIRS:
        return 2
    if parts[-1] == "auth" or parts[-2:] == ["auth", "header"]:
        return 1
    # The plural `keys` names entries of a batch, except in the pairs above.
    ordinary = {"token": _SYMBOLS, "tokens": _SYMBOLS, "key": _ENTRIES}.get(parts[-1])
    return 0 if ordinary is None or (parts[-2:-1] and parts[-2] in ordinary) else 1


def _is_secret(name: str, value: Any, strength: int) -> bool:
    # Not `==`: an array does not compare to a text.
    if not isinstance(value, str):
        # A float is a rate or a share, as in `secret_loss_scale`, which `load_from_checkpoint` needs.
        return strength == 2 and value is not None and not isinstance(value, bool | float)
    if value in ("", HIDDEN) or (strength == 2 and name == "class_path"):
        return False
    if _IN_URL.search(value) or str(_variable_of(value)).startswith(VARIABLE_PREFIX):
        return True
    is_entry = "token" not in name.lower() and _ENTRY.fullmatch(value)
    return strength == 2 or (strength == 1 and not (is_entry or _SYMBOL.fullmatch(value)))


def _list_secrets(values: Any) -> list[tuple[_Path, Any, bool]]:
    """Path and value of every secret that is not a reference, and whether its key is that of a secret."""
    found: list[tuple[_Path, Any, bool]] = []

    def note(path: _Path, value: Any, named: bool) -> Any:
        if _variable_of(value) is None:
            found.append((path, value, named))
        return value

    _changed(values, note)
    return found


def _changed(value: Any, change: Callable[[_Path, Any, bool], Any], path: _Path = (), strength: int = 0) -> Any:
    """A copy of nested plain values with changed secrets. All values below a strong name are secrets."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        below = strength if strength == 2 else 0
        return {k: _changed(v, change, (*path, str(k)), max(below, _strength(str(k)))) for k, v in pairs}
    if isinstance(value, list | tuple):
        items = cast("list[Any]", value)
        return [_changed(v, change, (*path, str(n)), strength) for n, v in enumerate(items)]
    name = next((part for part in reversed(path) if not part.isdigit()), "")
    return change(path, value, strength > 0) if _is_secret(name, value, strength) else value


def _without(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without(v) for k, v in cast("Mapping[Any, Any]", value).items() if not _is_hidden(v)}
    return [_without(v) for v in value if not _is_hidden(v)] if isinstance(value, list) else value


def _is_hidden(value: Any) -> bool:
    return isinstance(value, str) and value == HIDDEN


def _variable_of(value: Any) -> str | None:
    found = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    return None if found is None else found[1]


def _variable(path: _Path, value: Any, named: bool, env: Mapping[str, str]) -> str:
    """The variable for a secret: one that holds it already, else one named after the secret's path."""
    # A reference to any variable is resolved only if the setting's name is that of a secret.
    if named:
        holders = (name for name in sorted(env) if env[name] == str(value) and _strength(name))
        holder = next((n for n in holders if re.fullmatch(r"[A-Za-z_]\w*", n, re.ASCII)), None)
        if holder is not None:
            return holder
    return VARIABLE_PREFIX + re.sub(r"\W+", "_", "_".join(path), flags=re.ASCII).upper()
