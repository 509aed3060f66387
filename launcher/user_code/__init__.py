"""The user's classes and objects: importing, checking and creating them.

Training belongs in `launcher.training`. The built-in demo is treated as user code too.
"""
