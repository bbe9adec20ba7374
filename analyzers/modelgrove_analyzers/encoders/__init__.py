"""Encoders: from weights to text space, each a plugin of kind embedder."""
