"""Packages of the field as their users train them, on data that they make or ship."""
