"""The user's own classes and objects: importing, checking and making them.

Nothing here trains; the built-in demo is treated as user code, too.
"""
