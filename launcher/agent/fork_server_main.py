"""Importing this module turns the process into the fork server.

`multiprocessing` lets a fork server import modules before it forks, but does not call a function.
"""

from launcher.agent.fork_server_process import become_fork_server

become_fork_server()
