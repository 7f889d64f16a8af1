"""The project's Celery app, as in Celery's documentation, with a gate."""

import os

from celery import Celery

from rate_limiter.celery import Gate

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")

app = Celery("django_shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
Gate(app)
