"""`launcher report`: one HTML page about a run, or about two runs to compare.

`source` reads a run directory, `history` turns events into records, `series` computes what is shown, `plots` draws it,
and `templates/` holds the markup and the text of the page. Nothing here writes into a run, except the report itself.
"""
