"""From files on disk to registered models: discover → prepare → register."""
