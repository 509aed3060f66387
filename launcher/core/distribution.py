"""The version, the name on PyPI and the packages of this distribution."""

__version__ = "0.1.0"

# `launcher` on PyPI is another project.
DISTRIBUTION = "training-launcher"
# All in one folder.
OWN_PACKAGES = ("launcher", "strategies", "slurm")


def describe_install(extra: str) -> str:
    """The command that adds the libraries of an extra of pyproject.toml to any installation of this package."""
    return f'pip install "{DISTRIBUTION}[{extra}]"'
