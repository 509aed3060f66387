"""SLURM: job requests, the batch script, the task on each node, queue commands, and SLURM's variables.

Imports nothing of `launcher` or `strategies`. Nothing here knows about run configs or events, except the two files of a
run directory that the task reads.
"""
