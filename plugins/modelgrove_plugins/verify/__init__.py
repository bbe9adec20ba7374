"""Marks and claims: what shows that weights come from a release, and what tries to take that away."""
