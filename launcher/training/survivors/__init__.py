"""What a rank keeps at each step, and what survivors of a failure save, so that a restart under DDP loses no step.

Imports torch and lightning.
"""
