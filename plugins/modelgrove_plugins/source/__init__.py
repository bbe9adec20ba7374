"""Sources: where models come from, one address kind a file."""
