"""From a signal to a checkpoint: signals are received, ranks agree on a step, all of them save there and leave.

How a failed training ends in a script is in `launcher.training.script_end`.
"""
