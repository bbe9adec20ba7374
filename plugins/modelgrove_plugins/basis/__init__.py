"""Columns of shared bases: what a base needs of them, and whether an adapter keeps to its own."""
