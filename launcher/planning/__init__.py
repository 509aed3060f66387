"""The plan of a run: strategy, precision, batch split and memory, with reasons, and the next strategy after OOM.

`strategies` has the rules; this package applies them to the config, the agreement of the ranks and the user's model.
It starts no training and writes no files but the plan itself.
"""
