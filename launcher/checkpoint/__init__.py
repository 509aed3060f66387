"""Checkpoint files: their formats, integrity, precision, and how they are read without running foreign code.

What a training puts into a checkpoint is decided in `training`.
"""
