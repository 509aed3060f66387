"""Helpers that tests share: models, processes, stand-ins for external programs, and records to compare."""
