"""Lightning's training loops, changed so that a run resumes from one `Position`.

Callbacks belong in `callbacks`, `stop` and `resume`.
"""
