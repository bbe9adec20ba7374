"""The registry: models, revisions and lineage, kept in SQLite or PostgreSQL."""
