"""Packages of the Lightning ecosystem, trained as in their tutorials, on generated or included data."""
