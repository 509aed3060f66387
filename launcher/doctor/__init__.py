"""`launcher doctor`: checks of this machine, its GPUs and network, and a preflight over several nodes.

Nothing here changes the machine.
"""
