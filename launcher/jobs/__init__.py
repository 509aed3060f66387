"""Jobs: submit them, show their status and logs, cancel them; sweeps of several runs.

The places where jobs run are in `backends`; SLURM's own commands are in the package `slurm`.
"""
