"""Rate limits for Celery tasks."""
