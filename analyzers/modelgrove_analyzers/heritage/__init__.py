"""Where a model comes from: copies of every kind, and what changed between two models."""
