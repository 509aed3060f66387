"""The directory of a run and the records in it: its lock, strategies that ran out of memory, submissions.

Checkpoints are in `checkpoint`; views of a run are in `report` and `jobs`.
"""
