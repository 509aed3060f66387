"""The config: its schema, where its values come from, and their validation.

Nothing here imports the user's classes, looks at hardware or starts anything.
"""
