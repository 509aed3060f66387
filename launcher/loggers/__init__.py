"""Trackers of a run: W&B and any Lightning logger, with one base class.

Also which loggers a run has, and how a resumed run continues their files. The measurements that they receive are in
`monitoring`.
"""
