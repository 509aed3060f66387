"""Basics that every other package may use: errors, events, atomic writes, YAML, the terminal, secrets.

Nothing here depends on ranks, runs or training. Code that only one package uses belongs in that package.
"""
