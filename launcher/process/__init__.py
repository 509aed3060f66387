"""What the agent and its ranks share as processes: heartbeats, status files, logs, the death of a parent.

Nothing here decides about a training or knows what a rank computes.
"""
