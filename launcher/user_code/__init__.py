"""The user's classes and objects: importing, checking and creating them.

Nothing here trains. The built-in demo is treated as user code too.
"""
