"""Starts and supervises the ranks of a node: fork server, rendezvous, failure reports, hangs, restarts, signals.

The code that a rank runs after its start belongs in `training`; primitives that ranks use too belong in `process`.
"""
