"""Jobs: submit them, show their status and logs, cancel them; sweeps of several runs.

What SLURM itself says and takes is in the package `slurm`.
"""
