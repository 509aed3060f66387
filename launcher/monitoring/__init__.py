"""The loss scale and the speed of all ranks, gathered while they train.

Where the rows go is in `loggers`; what an agent sees from outside is in `agent`.
"""
