"""Pure decisions of a training run (precision, batch split, memory, choice) and the strategies themselves.

A strategy is one entry of `strategies.registry`. Nothing here reads the environment or files of a run, or knows the
launcher or W&B; modules that decide need no torch, modules that build Lightning's objects do.
"""
