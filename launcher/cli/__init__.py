"""The command line: subcommands, help, completion, and the one place where errors become text and exit codes.

What a subcommand does is in the package it belongs to.
"""
