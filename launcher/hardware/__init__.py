"""Hardware and topology of this process: its device and CPU cores, and its place among the ranks.

Also the hardware of other machines to plan for. `agreement` and `planning` use these records.
"""
