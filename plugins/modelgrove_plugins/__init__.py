"""Methods that change or show models: one a file."""
