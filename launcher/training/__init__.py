"""What runs inside a rank: from a config to a trained model, and the callbacks and loops of every run.

How ranks are started and restarted is in `agent`.
"""
