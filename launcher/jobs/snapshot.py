"""Copies the code when a job is submitted. Later edits do not affect the job."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

from launcher.core.errors import QueueError
from launcher.core.secrets import find_secrets

# Larger repositories contain data.
_MAX_BYTES = 500_000_000
# A folder with more ignored entries and without code is a data folder with a few files in git.
_MAX_LINKS = 1000
# Patterns of names of files with credentials, and suffixes of files whose keys may name secrets.
_CREDENTIALS = (".env", ".env.*", "*.env", ".netrc", ".pypirc", ".git-credentials", "*.pem", "*.key", "id_rsa",
                "id_ed25519", "credentials", "credentials.*", "kaggle.json")  # fmt: skip
_SETTINGS = (".yaml", ".yml", ".json", ".toml")
# Larger files are data.
_MAX_SETTINGS_BYTES = 200_000
# A quick check, since most files need not be parsed.
_HINTS = re.compile(rb"token|key|passw|pwd|passphrase|secret|cred|auth|://", re.IGNORECASE)


def take_snapshot(cwd: Path, folder: Path, runs: Path) -> Path | None:
    """Copy the repository of `cwd` to `folder`: tracked and untracked files and submodules; returns the copy of `cwd`.

    Ignored files and files with secrets are linked instead. submitit's `RsyncSnapshot` copies only tracked files, and
    needs rsync.

    Args:
        cwd: where the run is submitted; without a git repository, the result is None.
        folder: to create, on a disk that the nodes share.
        runs: folder of the runs, which is not copied.

    Raises:
        QueueError: the repository is too large, or the disk is full.
    """
    output = _git(cwd, "rev-parse", "--show-toplevel") if shutil.which("git") else None
    if output is None:
        return None
    root = Path(os.fsdecode(output).rstrip("\n"))
    # Git also prints its folder without links.
    runs = runs.parent.resolve() / runs.name
    try:
        _copy(root, folder, _list_files(root), runs)
        here = folder / cwd.resolve().relative_to(root.resolve())
        here.mkdir(parents=True, exist_ok=True)
        _link_ignored(root, folder, here, runs)
    except OSError as error:
        raise QueueError(
            f"the code cannot be copied to {folder}: {error.filename or folder}: {error.strerror or error}; free "
            "some space, make that file readable, or use --no-snapshot"
        ) from error
    return here


def _list_files(root: Path, prefix: str = "") -> list[str]:
    """Tracked and untracked files, with those of submodules and nested repositories."""
    listed = _git(root / prefix, "ls-files", "-z", "--cached", "--others", "--exclude-standard") or b""
    names: list[str] = []
    for name in dict.fromkeys(prefix + os.fsdecode(each) for each in listed.split(b"\0") if each):
        inner = root / name
        if inner.is_dir() and not inner.is_symlink():
            # A submodule that is not checked out has no files.
            names += _list_files(root, f"{name.rstrip('/')}/") if (inner / ".git").exists() else []
        else:
            names.append(name)
    return names


def _copy(root: Path, folder: Path, names: list[str], runs: Path) -> None:
    total = 0
    for name in names:
        source = root / name
        # The file may be deleted, and the deletion not committed.
        if not (source.is_file() or source.is_symlink()) or source.is_relative_to(runs):
            continue
        total += source.lstat().st_size
        if total > _MAX_BYTES:
            raise QueueError(
                f"{root} has more than {_MAX_BYTES // 1_000_000} MB that git does not ignore; add its data to "
                ".gitignore, or use --no-snapshot"
            )
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(_link_target(source, root, folder, runs))
        elif secrets := _find_secrets_in(source):
            sys.stderr.write(
                f"notice: {name} contains a secret ({secrets[0]}): the job gets a link instead of a copy\n"
            )
            target.symlink_to(source)
        else:
            shutil.copy2(source, target, follow_symlinks=False)


def _link_target(link: Path, root: Path, folder: Path, runs: Path) -> Path:
    """The target of a copied link: the copy of its target if that is code, otherwise the target itself."""
    target = link.readlink()
    original = Path(os.path.normpath(link.parent / target))
    if not original.is_relative_to(root) or original.is_relative_to(runs):
        return original
    return folder / original.relative_to(root) if target.is_absolute() else target


def _link_ignored(root: Path, folder: Path, here: Path, runs: Path) -> None:
    """Link ignored files at any depth: the copy needs compiled modules, generated files and data too."""
    for parent, folders, _ in os.walk(folder):
        copy = Path(parent)
        original = root / copy.relative_to(folder)
        missing = [
            entry for entry in original.iterdir()
            if entry.name not in (".git", "__pycache__") and entry != runs and not os.path.lexists(copy / entry.name)
        ]  # fmt: skip
        if len(missing) > _MAX_LINKS and not here.is_relative_to(copy) and not any(copy.rglob("*.py")):
            sys.stderr.write(
                f"notice: {original} has {len(missing)} entries that git ignores: the job gets a link to that "
                "folder, so later edits in it reach the job\n"
            )
            shutil.rmtree(copy)
            copy.symlink_to(original)
            folders.clear()
            continue
        for entry in missing:
            (copy / entry.name).symlink_to(entry)


def _find_secrets_in(file: Path) -> list[str]:
    """Dotted paths of the secrets in a file of settings, or the name of a credentials file; empty for others."""
    if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _CREDENTIALS):
        return [file.name]
    if file.suffix not in _SETTINGS or file.stat().st_size > _MAX_SETTINGS_BYTES:
        return []
    text = file.read_bytes()
    return list(find_secrets(_read_settings(text, file.suffix))) if _HINTS.search(text) else []


def _read_settings(text: bytes, suffix: str) -> Any:
    try:
        if suffix == ".json":
            return json.loads(text)
        if suffix == ".toml":
            return tomllib.loads(text.decode())
        documents = list(yaml.safe_load_all(text))
        return documents[0] if len(documents) == 1 else documents
    except (ValueError, yaml.YAMLError, RecursionError):
        return None  # a template, or damaged


def _git(cwd: Path, *arguments: str) -> bytes | None:
    done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, check=False)  # noqa: S607 -- git is on PATH
    return done.stdout if done.returncode == 0 else None
