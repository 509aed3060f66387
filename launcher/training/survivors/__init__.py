"""What a rank keeps at each step, and what survivors of a failure save, so that no step is lost.

Imports torch and lightning.
"""
