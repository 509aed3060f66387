"""Starts and supervises the ranks of a node: rendezvous, fork server, restarts, failures, hangs.

What a rank does after its start is in `training`.
"""
