"""Recognise models from names and shapes: listings, signatures, verdicts; and read adapters."""
