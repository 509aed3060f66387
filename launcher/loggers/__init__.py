"""Where the rows of a run go: W&B, and the loggers of the user's own.

What is measured is in `monitoring`.
"""
