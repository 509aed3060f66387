"""The directory of a run and the records in it: who owns it, what ran out of memory, what was submitted.

Checkpoints are in `checkpoint`; what is shown of a run is in `report` and `jobs`.
"""
