"""The state that a resume restores in addition to Lightning's own, one module for each part; checkpoint conversion.

The position in the data is in `loops`. File formats are in `launcher.checkpoint`.
"""
