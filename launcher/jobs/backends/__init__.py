"""Job back ends: one module for each place where jobs run, behind the base class of `base.py`.

`registry.py` lists them by the name that `--cluster` takes. SLURM's own commands are in the package `slurm`.
"""
