"""Hardware and topology of this process: its device and CPU cores, and its place among the ranks.

Also hardware that a plan is made for. `agreement` and `planning` decide what the ranks do with it.
"""
