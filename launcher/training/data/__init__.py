"""The training and evaluation data of a rank: order of the samples, seeds of the draws, loader workers.

Where in an epoch a resume continues is decided in `loops`.
"""
