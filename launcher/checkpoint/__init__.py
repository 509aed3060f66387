"""Checkpoint files: formats, integrity, precision, and reading them without running untrusted code.

The state that a training saves in a checkpoint belongs in `launcher.training`.
"""
