"""Celery lives here and nowhere else."""
