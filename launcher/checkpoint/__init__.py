"""Checkpoint files: formats, integrity, precision, and reading them without running untrusted code.

What a training saves in a checkpoint belongs in `launcher.training`.
"""
