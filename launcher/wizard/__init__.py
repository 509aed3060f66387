"""`launcher init`: asks for a config step by step, and writes it.

`answers` is the record of the answers, `steps` the questions, `prompter` asks them. Reading and checking a config is
the job of `launcher.config`.
"""
