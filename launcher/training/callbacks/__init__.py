"""Callbacks of every run: events, progress, checkpoints, heartbeat, memory.

Callbacks that restore state are in `resume`, the one that stops a run is in `stop`.
"""
