"""The config: its schema, its sources and its validation.

Nothing here imports the user's classes, reads hardware or starts a process.
"""
