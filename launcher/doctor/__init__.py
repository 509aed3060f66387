"""`launcher doctor`: checks of this machine, and the preflight, which measures the ranks of a cluster.

`checks`, `gpus` and `network` turn facts into findings; `preflight_*` starts ranks, measures them and reports.
"""
