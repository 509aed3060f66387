"""What a resume restores beyond Lightning's own checkpoint, one module for each part, and checkpoint conversion.

The position in the data is in `loops`. File formats are in `launcher.checkpoint`.
"""
