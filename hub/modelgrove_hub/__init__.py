"""The ground: registry, blob store, recognition, plugin contract, jobs, search and the command line."""
