"""A snapshot has all files of the original, and later edits of code do not reach it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launcher.core.errors import QueueError
from launcher.jobs.snapshot import take_snapshot

CODE = "committed\n"


def git(cwd: Path, *arguments: str) -> None:
    own = ("user.name=a", "user.email=a@b", "init.defaultBranch=main", "protocol.file.allow=always")
    done = subprocess.run(
        ["git", *(word for each in own for word in ("-c", each)), *arguments], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def fill(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with all that may be in one."""
    fill(tmp_path, {"outside/x.txt": "data", "library/lib.py": CODE, "library/.gitignore": "*.so\n"})
    git(tmp_path / "library", "init")
    git(tmp_path / "library", "add", "-A")
    git(tmp_path / "library", "commit", "-m", "x")
    root = tmp_path / "team" / "repo"
    fill(root, {
        ".gitignore": "*.so\nassets/\n/data/*\n!/data/README\nruns/\n", "pkg/__init__.py": CODE,
        "pkg/deep/er/m.py": CODE,
        "data/README": CODE, "scripts/run me.py": CODE, "pkg/umläut.py": CODE,
    })  # fmt: skip
    git(root, "init")
    git(root, "submodule", "add", str(tmp_path / "library"), "third_party/lib")
    for link, to in {"inside": "pkg/deep", "pkg/out": "../../../outside", "pkg/absolute": f"{root}/pkg/deep",
                     "far": f"{tmp_path}/outside", "pkg/deep/up": "../__init__.py", "latest": "runs/old",
                     "dangling": "nowhere"}.items():  # fmt: skip
        (root / link).symlink_to(to)
    git(root, "add", "-A")
    git(root, "commit", "-m", "x")
    fill(root, {
        "pkg/_ext.so": "built", "pkg/assets/vocab.txt": "v", "pkg/deep/er/_c.so": "built", "data/1.bin": "d",
        "third_party/lib/_l.so": "built", "runs/old/events.jsonl": "", "pkg/new.py": CODE, "pkg/__pycache__/m.pyc": "",
        "other/inner.py": CODE,
    })  # fmt: skip
    (root / "empty").mkdir()
    git(root / "other", "init")
    return root


def everything(root: Path) -> set[str]:
    """Every path below that exists, through links to folders too."""
    return {
        str(Path(parent, name).relative_to(root))
        for parent, folders, files in os.walk(root, followlinks=True)
        if not {".git", "__pycache__", "runs"} & set(Path(parent).relative_to(root).parts)
        for name in (*folders, *files)
        if name not in (".git", "__pycache__", "runs") and Path(parent, name).exists()
    }  # fmt: skip


@pytest.mark.parametrize("inside", ["", "pkg"])
def test_the_snapshot_has_all_files_of_the_original(root: Path, inside: str) -> None:
    runs = root / inside / "runs"
    here = take_snapshot(root / inside, runs / "x" / "code", runs)
    copy = runs / "x" / "code"
    assert here == copy / inside
    assert everything(root) <= everything(copy)
    assert not (copy / ".git").exists()
    assert not (copy / inside / "runs").exists()


def test_later_edits_of_code_do_not_reach_the_snapshot(root: Path) -> None:
    runs = root / "runs"
    copy = take_snapshot(root, runs / "x" / "code", runs)
    assert copy is not None
    code = [path for path in root.rglob("*.py") if "runs" not in path.parts]
    assert len(code) == 7
    for path in code:
        path.write_text("edited later\n")
    for path in code:
        assert (copy / path.relative_to(root)).read_text() == CODE, path
    # Links of the original lead to the copy's code, whichever way they are written.
    for name in ("inside/er/m.py", "pkg/absolute/er/m.py", "pkg/deep/up"):
        assert (copy / name).read_text() == CODE, name


def test_files_with_secrets_are_links_and_the_notice_has_only_the_key(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = "CANARY-x9"
    secret = {
        "train.yaml": f"model: {{init_args: {{hf_token: {canary}}}}}\n", "pkg/.env": f"X={canary}\n",
        "conf/db.toml": f'uri = "db://me:{canary}@host"\n', "conf/hub.json": f'[{{"password": "{canary}"}}]',
    }  # fmt: skip
    plain = {"plain.yaml": "a: {pad_token: '[PAD]', label_key: y}\n", "conf/damaged.yaml": "token: {{ x }\n",
             "conf/template.json": '{"token": <<x>>}', "conf/empty.yaml": "", "tokens.py": "token = 1\n"}  # fmt: skip
    fill(root, {**secret, **plain})
    runs = root / "runs"
    copy = take_snapshot(root, runs / "x" / "code", runs)
    assert copy is not None
    assert {name: (copy / name).is_symlink() for name in (*secret, *plain)} == {
        **dict.fromkeys(secret, True), **dict.fromkeys(plain, False),
    }  # fmt: skip
    assert [path for path in copy.rglob("*") if path.is_file() and not path.is_symlink()
            and canary in path.read_text()] == []  # fmt: skip
    notices = capsys.readouterr().err
    assert "notice: train.yaml contains a secret (model.init_args.hf_token)" in notices
    assert canary not in notices


def test_a_folder_of_many_data_files_becomes_one_link_with_a_notice(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1001):
        (root / f"data/{number}.bin").touch()
        (root / f"pkg/{number}.so").touch()
    runs = root / "runs"
    copy = take_snapshot(root, runs / "x" / "code", runs)
    assert copy is not None
    assert (copy / "data").readlink() == root / "data"
    assert capsys.readouterr().err.startswith(f"notice: {root}/data has 1001 entries that git ignores")
    assert not (copy / "pkg").is_symlink(), "code stays a copy"
    assert everything(root) <= everything(copy)


def test_outside_of_git_there_is_no_snapshot(tmp_path: Path) -> None:
    assert take_snapshot(tmp_path, tmp_path / "runs/code", tmp_path / "runs") is None


def test_a_folder_that_cannot_be_written_is_an_error(root: Path) -> None:
    (root / "file").touch()
    with pytest.raises(QueueError, match="the code cannot be copied to"):
        take_snapshot(root, root / "file" / "code", root / "runs")
