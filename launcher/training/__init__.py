"""The code inside a rank, from a config to a trained model. `fit` is the main path, `evaluate` the second one.

`decision` agrees and plans with the other ranks, `run` trains, `stop` handles signals, `resume` restores, `data` orders
the samples. Starting and restarting ranks belongs in `launcher.agent`.
"""
