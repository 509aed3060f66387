"""Primitives that the agent and its ranks share: heartbeats, status files, logs, the death of a parent.

Nothing here makes a decision about a training or knows what a rank computes.
"""
