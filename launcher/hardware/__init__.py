"""Devices, CPU cores and ranks: what is here, and where this process is among the ranks.

What the ranks do with it is decided in `planning` and `agreement`.
"""
