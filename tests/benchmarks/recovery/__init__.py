"""Recovery from killed ranks: against other tools, as an acceptance test, and its cost per step.

The command is `python -m tests.benchmarks.recovery`; see `__main__.py`. The trainings are in `training.py` and
`cases.py`, and one round (start, kill, wait, compare) in `rounds.py`.
"""
