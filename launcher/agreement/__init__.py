"""What the ranks exchange before training, over the c10d store, and the process group that follows.

What is decided from it is the plan, in `planning`.
"""
