"""The release workflow, the Dockerfile and CITATION.cff, which no test can run, agree with the package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from launcher.core.distribution import DISTRIBUTION, OWN_PACKAGES, __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
# YAML 1.1 reads the key `on` as true.
PARSED: dict[Any, Any] = yaml.safe_load(WORKFLOW)
JOBS: dict[str, Any] = PARSED["jobs"]


def steps(job: str) -> list[dict[str, Any]]:
    return JOBS[job]["steps"]


def script(name: str) -> str:
    (found,) = [step["run"] for step in steps("build") if step.get("name") == name]
    return found


def run_script(name: str, folder: Path, tag: str) -> int:
    """Run a step as GitHub does; returns the exit code."""
    env = {"PATH": "/usr/bin:/bin", "GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "me/mine",
           "GITHUB_REF_NAME": tag}  # fmt: skip
    return subprocess.run(["bash", "-eo", "pipefail", "-c", script(name)], cwd=folder, env=env, check=False,
                          capture_output=True, timeout=30).returncode  # fmt: skip


def test_a_tag_is_published_after_tests_and_checks_by_trusted_publishing_without_a_secret() -> None:
    assert PARSED[True] == {"push": {"tags": ["v*"]}}
    assert set(JOBS["publish"]["needs"]) == {"test", "build"}
    runs = [step.get("run") or step["uses"].partition("@")[0] for step in steps("build")]
    order = ["python -m build", "twine check --strict dist/*", "actions/upload-artifact"]
    assert runs[-3:] == order
    assert PARSED["permissions"] == {"contents": "read"}
    assert {name for name, job in JOBS.items() if "permissions" in job} == {"publish"}
    assert JOBS["publish"]["permissions"] == {"id-token": "write"}
    assert JOBS["publish"]["environment"] == "pypi"
    assert not re.search(r"secrets\.|password", str(PARSED))


def test_the_workflow_names_the_distribution_and_its_environment_for_the_publisher() -> None:
    to_do = WORKFLOW.partition("To do once")[2].partition("name: release")[0]
    assert {f'"{DISTRIBUTION}"', '"release.yml"', '"pypi"'} <= set(re.findall(r'"[^"]+"', to_do))


def test_actions_are_pinned_to_a_major_version() -> None:
    used = [step["uses"] for job in JOBS for step in steps(job) if "uses" in step]
    assert len(used) >= 6
    assert [action for action in used if not re.search(r"@(release/)?v\d+$", action)] == []


@pytest.mark.parametrize(
    ("tag", "is_accepted"), [(f"v{__version__}", True), ("v99.0", False), (__version__[:-1], False)]
)
def test_the_tag_must_be_the_version(tag: str, is_accepted: bool) -> None:
    assert (run_script("The tag is the version", ROOT, tag) == 0) is is_accepted


def test_links_of_the_published_readme_lead_to_the_repository(tmp_path: Path) -> None:
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    relative = re.findall(r"\]\(([^:)]+)\)", (tmp_path / "README.md").read_text())
    assert run_script("Addresses of this repository", tmp_path, "v1.0") == 0
    text = (tmp_path / "README.md").read_text()
    assert re.findall(r"\]\(([^:)]+)\)", text) == []
    assert "](https://github.com/me/mine/raw/v1.0/docs/images/plan.svg)" in text
    assert "](https://github.com/me/mine/blob/v1.0/CHANGELOG.md)" in text
    assert text.count("https://github.com/me/mine/") == len(relative)
    urls = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["urls"]
    assert urls == {
        "Source": "https://github.com/me/mine",
        "Changelog": "https://github.com/me/mine/blob/v1.0/CHANGELOG.md",
    }


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each instruction of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


def test_the_images_torch_is_one_that_the_package_accepts_and_has_a_compiler_for_cuda() -> None:
    (default,) = [rest for name, rest in instructions() if name == "ARG"]
    found = re.fullmatch(r"PYTORCH_IMAGE=pytorch/pytorch:([\d.]+)-cuda[\d.]+-cudnn\d+-devel", default)
    assert found is not None, default
    (torch,) = [each for each in map(Requirement, PROJECT["dependencies"]) if each.name == "torch"]
    assert torch.specifier.contains(found[1])
    bases = [rest for name, rest in instructions() if name == "FROM"]
    assert bases == ["python:3.11-slim AS wheel", "${PYTORCH_IMAGE}"]


def test_the_image_is_built_from_files_that_exist_and_are_sent_to_docker() -> None:
    copied = [file.rstrip("/") for name, rest in instructions() if name == "COPY" for file in rest.split()[:-1]]
    assert {*OWN_PACKAGES, "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} == set(copied)
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in patterns if line.startswith("!")}
    ignored = [line for line in patterns if line and line[0] not in "!#"]
    assert ignored[0] == "*"
    assert sent == set(copied)
    for file in copied:
        assert (ROOT / file).exists()
        assert not any(fnmatch(file, pattern) for pattern in ignored[1:])


def test_the_container_runs_the_command_as_another_user_than_root() -> None:
    found = instructions()
    user = [rest for name, rest in found if name == "USER"][-1]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user), "Kubernetes can only check a number"
    (entry,) = [json.loads(rest) for name, rest in found if name == "ENTRYPOINT"]
    assert entry[0] in PROJECT["scripts"]
    assert not re.search(r"(?i)token|secret|password|api_key", str(found))


def test_the_citation_has_the_fields_of_its_format_and_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
