"""Finds files with secrets in a repository, by their names, or by the keys in a file of settings."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from launcher.core.secrets import find_secrets

_NAMES = (".env", ".env.*", "*.env", ".netrc", ".pypirc", ".git-credentials", "*.pem", "*.key", "id_rsa", "id_ed25519",
          "credentials", "credentials.*", "kaggle.json")  # fmt: skip
_SETTINGS = (".yaml", ".yml", ".json", ".toml")
# Larger files are data.
_MAX_BYTES = 200_000
# A quick check, since most files need not be parsed.
_HINTS = re.compile(rb"token|key|passw|pwd|passphrase|secret|cred|auth|://", re.IGNORECASE)


def find_secrets_in(file: Path) -> list[str]:
    """Dotted paths of the secrets in a file of settings, or the name of a credentials file; empty for others."""
    if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _NAMES):
        return [file.name]
    if file.suffix not in _SETTINGS or file.stat().st_size > _MAX_BYTES:
        return []
    text = file.read_bytes()
    return list(find_secrets(_read(text, file.suffix))) if _HINTS.search(text) else []


def _read(text: bytes, suffix: str) -> Any:
    try:
        if suffix == ".json":
            return json.loads(text)
        if suffix == ".toml":
            return tomllib.loads(text.decode())
        documents = list(yaml.safe_load_all(text))
        return documents[0] if len(documents) == 1 else documents
    except (ValueError, yaml.YAMLError, RecursionError):
        return None  # a template, or damaged
