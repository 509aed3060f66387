"""The plan: strategy, precision, batch split and memory of a run, with the reasons.

The decisions themselves are in `strategies`; here they meet config, agreement and the user's model.
"""
