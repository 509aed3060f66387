"""The loss scale and the speed of all ranks, gathered while they train, and the alerts about them.

Trackers that receive the rows are in `loggers`; what an agent observes from outside a rank is in `agent`.
"""
