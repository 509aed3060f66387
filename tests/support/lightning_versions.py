"""Train with the callback under other versions of Lightning, each in a separate virtual environment.

    python -m tests.support.lightning_versions [lightning==2.1.4 ...]

An environment links all packages of this one except Lightning's, and installs one of those from the package index.
The installed version uses this environment.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
# The oldest Lightning 2 that trains with the newest torch, the newest one, and the last of Lightning 1, with
# short precision strings.
VERSIONS = ("lightning==2.1.4", "lightning==2.6.*", "pytorch_lightning==1.9.5")
# setuptools too: pip would replace the files behind the link.
_OWN = ("lightning", "pytorch_lightning", "training_launcher", "setuptools", "pkg_resources", "distutils_hack")


def make_environment(folder: Path, requirement: str) -> Path:
    """A virtual environment with one version of Lightning; its Python.

    Args:
        folder: does not exist yet.
        requirement: argument of pip install.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        name = entry.name.split("-")[0].split(".")[0].lstrip("_")
        if name not in _OWN and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    # Lightning before 2.2 imports pkg_resources, which setuptools contains until 80.
    subprocess.run([*pip, requirement, "setuptools<81"], check=True, timeout=120)
    return python


def train(python: Path) -> str:
    """Output of `lightning_versions_worker` under that Python.

    Args:
        python: of the environment.
    """
    finished = subprocess.run(
        [str(python), str(REPOSITORY / "tests" / "support" / "lightning_versions_worker.py")],
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"exit code {finished.returncode}\n{finished.stdout}\n{finished.stderr}")
    return finished.stdout.strip().splitlines()[-1]


def check(requirements: Sequence[str]) -> list[tuple[str, str]]:
    """Results of each version: name and version, its precision string, and the logged rows.

    Args:
        requirements: arguments of pip install, one for each environment.
    """
    results: list[tuple[str, str]] = []
    for requirement in requirements:
        wanted = Requirement(requirement)
        if wanted.name == "lightning" and wanted.specifier.contains(version("lightning")):
            results.append((requirement, train(Path(sys.executable))))
            continue
        with tempfile.TemporaryDirectory() as folder:
            results.append((requirement, train(make_environment(Path(folder) / "venv", requirement))))
    return results


if __name__ == "__main__":
    for name, line in check(sys.argv[1:] or VERSIONS):
        print(f"{name}: {line}")
