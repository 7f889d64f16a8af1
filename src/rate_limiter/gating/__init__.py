"""Limits, and the engine that decides about jobs. Both gates use it. It imports neither Celery nor kombu."""
