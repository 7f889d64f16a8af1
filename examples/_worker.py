"""Runs a worker in the example's own process, so that each example is one file that needs no services.

In your project this is `celery -A yourapp worker`, and a broker.
"""

import contextlib

from celery.contrib.testing.worker import start_worker


@contextlib.contextmanager
def running_worker(app, **options):
    """Run a worker of ``app``, on a broker in memory, while the block lasts."""
    app.conf.broker_transport_options = {"polling_interval": 0.02}  # the default is 1 s
    app.set_default()  # in all threads: the worker runs in another one here
    with start_worker(app, pool="threads", concurrency=4, perform_ping_check=False, **options):
        yield
