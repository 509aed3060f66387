"""What this distribution is: its version and its packages."""

__version__ = "0.1.0"

# They lie side by side.
OWN_PACKAGES = ("launcher", "strategies", "slurm")
