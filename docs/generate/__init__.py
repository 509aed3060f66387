"""Generates parts of the documentation from the code, while mkdocs builds the site."""
