"""What every other package may use: errors, events, files written at once, YAML, the terminal, secrets.

Nothing here knows of ranks, runs or training. What only one package uses belongs there.
"""
