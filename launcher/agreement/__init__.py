"""The exchange between the ranks before training, over the c10d store, and the process group.

The decision that is made from it, the plan, is in `planning`.
"""
