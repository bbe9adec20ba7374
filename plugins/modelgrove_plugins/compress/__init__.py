"""Compressors: one method a file."""
