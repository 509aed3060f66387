"""`launcher init`: questions whose answers become a config file.

What the config means is in `config`; what the plan makes of it in `planning`.
"""
