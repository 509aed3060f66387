"""`launcher report`: one HTML page that tells what happened in a run, or in two."""
