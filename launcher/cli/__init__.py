"""The command line: subcommands, help, completion, and the one place where errors become text and exit codes.

The work of a subcommand is in the package it belongs to.
"""
