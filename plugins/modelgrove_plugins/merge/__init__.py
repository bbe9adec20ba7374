"""Mergers: one method a file."""
