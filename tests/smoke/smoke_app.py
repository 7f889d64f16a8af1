"""The worker containers' app. pytest-celery fills in the three lines that it finds by their text."""

from celery import Celery

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate

imports = None
app = Celery("celery_test_app")
config = None

app.config_from_object(config)
gate = Gate(app)
gate.limit(queue="bulk", bucket=TokenBucket(capacity=1, tokens_per_second=10))
