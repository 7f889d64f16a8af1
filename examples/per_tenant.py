"""Each tenant has a limit of its own: a tenant with a backlog keeps no other waiting.

`uv run examples/per_tenant.py` sends 12 reports for one tenant, and then one for each of two others, where
each tenant may have 2 at once and then 5 a second:

    tenant  reports  the last one was ready after
    acme         12    2.0 s
    beta          1    0.0 s
    corp          1    0.0 s
    Only acme waited.
"""

import collections
import sys
import time

from _worker import running_worker
from celery import Celery

from rate_limiter.celery import Gate, throttle

app = Celery("per_tenant", broker="memory://", backend="cache+memory://")
Gate(app)


@app.task
@throttle("5/s", burst=2, key="tenant")
def make_report(tenant, number):
    return time.monotonic()


def main():
    with running_worker(app):
        begin = time.monotonic()
        jobs = [("acme", number) for number in range(12)] + [("beta", 0), ("corp", 0)]
        results = [(tenant, make_report.delay(tenant, number)) for tenant, number in jobs]
        ready = collections.defaultdict(list)
        for tenant, result in results:
            ready[tenant].append(result.get(timeout=20) - begin)
    print("tenant  reports  the last one was ready after")
    for tenant, times in ready.items():
        print(f"{tenant:6}{len(times):9}{max(times):7.1f} s")
    if max(ready["acme"]) < 2 or max(ready["beta"] + ready["corp"]) > 1:
        sys.exit("The limit was not held, or somebody else waited!")
    print("Only acme waited.")


if __name__ == "__main__":
    main()
