"""A partner's API allows 10 calls a second; after an answer 429 no job calls it until it allows calls again.

`uv run examples/partner_api.py` makes 20 calls. At the ninth, the partner is busy for a second:

     0.0 s  order 0: accepted
     ... (7 more)
     0.4 s  order 8: 429 Too Many Requests, retry after 1 s
     1.5 s  order 9: accepted
     ... (10 more)
     2.6 s  order 8: accepted
    All 20 orders were accepted, and the partner had its second of peace.
"""

import sys
import time

from _worker import running_worker
from celery import Celery

from rate_limiter import RetryAfter, TokenBucket
from rate_limiter.celery import Gate, throttle

app = Celery("partner_api", broker="memory://", backend="cache+memory://")
Gate(app)


@app.task
@throttle(TokenBucket(capacity=5, tokens_per_second=10))
def place(order):
    try:
        return partner.post(order)
    except PartnerBusyError as refusal:
        # No job gets a token during the pause. After it this job runs again.
        raise RetryAfter(refusal.retry_after) from None


# -- everything below plays the partner, and sends orders -----------------------------------------------


class PartnerBusyError(Exception):
    """429 Too Many Requests."""

    def __init__(self, retry_after):
        super().__init__(retry_after)
        self.retry_after = retry_after


class Partner:
    """Is busy for a second at the ninth call."""

    def __init__(self):
        self.begin, self.busy_until, self.calls, self.disturbed = time.monotonic(), 0, 0, 0

    def post(self, order):
        """Accept an order, or answer 429."""
        now = time.monotonic()
        self.calls += 1
        if self.calls == 9:
            self.busy_until = now + 1
        elif now < self.busy_until:
            self.disturbed += 1
        busy = now < self.busy_until
        answer = "429 Too Many Requests, retry after 1 s" if busy else "accepted"
        print(f"{now - self.begin:4.1f} s  order {order}: {answer}\n", end="", flush=True)
        if busy:
            raise PartnerBusyError(retry_after=1)
        return order


partner = Partner()


def main():
    with running_worker(app):
        partner.begin = time.monotonic()
        results = [place.delay(order) for order in range(20)]
        accepted = [result.get(timeout=20) for result in results]
    if partner.disturbed > 3:  # more than what the other three threads may have begun
        sys.exit(f"The partner was called {partner.disturbed} times while it was busy!")
    print(f"All {len(accepted)} orders were accepted, and the partner had its second of peace.")


if __name__ == "__main__":
    main()
