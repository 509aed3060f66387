"""The version and the packages of this distribution."""

__version__ = "0.1.0"

# All in one folder.
OWN_PACKAGES = ("launcher", "strategies", "slurm")
