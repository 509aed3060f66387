"""Which files are the user's own code, and how ranks compare them."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from launcher.agreement.facts import RankFacts, agree_on
from launcher.core.errors import AgreementError
from launcher.user_code.sources import differing, digest_of, user_sources


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    (tmp_path / "us_alone.py").write_text("x = 1\n")
    (tmp_path / "us_pkg/inner").mkdir(parents=True)
    for name in ("__init__", "model", "later", "_version", "inner/__init__", "inner/deep"):
        (tmp_path / f"us_pkg/{name}.py").write_text(f"# {name}\n")
    yield tmp_path
    # Only modules in this folder: a library must not be imported twice.
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def imported(*names: str) -> dict[str, ModuleType | None]:
    importlib.invalidate_caches()
    for name in names:
        importlib.import_module(name)
    return dict(sys.modules)


def test_files_of_libraries_are_not_the_users(folder: Path) -> None:
    (folder / "venv/lib/python3/site-packages").mkdir(parents=True)
    (folder / "venv/lib/python3/site-packages/us_library.py").write_text("")
    sys.path.insert(0, str(folder / "venv/lib/python3/site-packages"))
    try:
        found = user_sources(
            imported("us_alone", "us_pkg.model", "us_library", "torch", "launcher.config.schema", "json")
        )
    finally:
        del sys.path[0]
    own = {name for name in found if name.startswith("us_")}
    # Files that may be imported later are compared too; a generated version file is not.
    assert own == {
        "us_alone.py", "us_pkg/__init__.py", "us_pkg/model.py", "us_pkg/later.py", "us_pkg/inner/__init__.py",
        "us_pkg/inner/deep.py",
    }  # fmt: skip
    others = {name.split("/")[0] for name in found} - {"us_alone.py", "us_pkg"}
    assert not others & {"torch", "launcher", "strategies", "slurm", "json", "lightning", "us_library.py"}


def test_script_is_identified_by_its_file_name(folder: Path) -> None:
    script = ModuleType("__main__")
    script.__file__ = str(folder / "us_alone.py")
    assert set(user_sources({"__main__": script})) == {"us_alone.py"}
    assert user_sources({"__main__": ModuleType("__main__"), "gone": None}) == {}


def test_line_ends_and_generated_files_make_no_difference(folder: Path) -> None:
    def now() -> dict[str, str]:
        return user_sources(imported("us_pkg"))

    before = now()
    model = folder / "us_pkg/model.py"
    model.write_bytes(model.read_bytes().replace(b"\n", b"\r\n"))
    (folder / "us_pkg/_version.py").write_text("version = 2\n")
    assert (now(), digest_of(now())) == (before, digest_of(before))
    (folder / "us_pkg/only_here.py").write_text("")
    assert differing(before, now()) == []
    model.write_text("# another\n")
    assert differing(before, now()) == ["us_pkg/model.py"]
    (folder / "us_pkg/inner/deep.py").unlink()
    assert differing(before, now()) == ["us_pkg/model.py"]


def test_error_names_ranks_and_files_but_no_content() -> None:
    base = {f"pkg/m{n}.py": "same" for n in range(12)}
    other = dict.fromkeys(base, "other")
    one = {**base, "pkg/m3.py": "stale", "own.py": "x"}
    sources = [base, base, one, other, other]
    facts = [
        RankFacts(rank, rank, 5, 0, "host", config_digest="d", sources_digest=digest_of(each), sources=each)
        for rank, each in enumerate(sources)
    ]
    # As received over the store: equal files are not sent.
    facts[1] = dataclasses.replace(facts[1], sources=None)
    with pytest.raises(AgreementError) as refused:
        agree_on([RankFacts.from_json(fact.to_json()) for fact in facts])
    reported = str(refused.value)
    assert "code: pkg/m3.py differs on rank 2 (host) from rank 0 (host)" in reported
    assert "pkg/m7.py and 4 more differ on rank 3 (host), rank 4 (host) from rank 0 (host)" in reported
    assert "stale" not in reported
    assert "rank 1 " not in reported
