"""A plain kombu consumer sends emails at 2/s and uploads at 10 MB/s, while other messages pass by.

Run it with `uv run examples/kombu_consumer/consumer.py`. It needs no services: broker, producer and
consumer live in this one process. For a real broker name it, as in
`BROKER=amqp://guest:guest@localhost// uv run examples/kombu_consumer/consumer.py`.

It prints each message as it is handled, then a table of what was set and what was measured, and ends by
itself after about eight seconds:

              burst  set rate  measured  messages  last after
    emails        2       2/s    2.00/s        16      7.00 s
    uploads      20      10/s   10.00/s        24      7.20 s
    clicks        -         -         -         8      0.01 s

    Every limit was held.

It exits with 1 if a limit was exceeded, or a message lost or handled twice.

Two lines make a kombu consumer a limited one: `GateMixin` before `ConsumerMixin`, and a `gate`.
"""

import os
import sys
import time

from kombu import Connection, Queue
from kombu.mixins import ConsumerMixin

from rate_limiter import TokenBucket
from rate_limiter.kombu import Gate, GateMixin

emails = TokenBucket(capacity=2, tokens_per_second=2)  # a burst of 2, then 2 a second
megabytes = TokenBucket(capacity=20, tokens_per_second=10)  # a burst of 20 MB, then 10 MB/s


class Worker(GateMixin, ConsumerMixin):
    """What any `ConsumerMixin` is, with a gate."""

    gate = Gate()
    gate.limit("emails", bucket=emails)
    gate.limit("uploads", bucket=megabytes, tokens="size")

    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):  # noqa: N803 - kombu's name for it
        """Consume three queues; the third has no limit."""
        queues = [Queue("emails"), Queue("uploads"), Queue("clicks")]
        return [Consumer(queues, callbacks=[self.on_task], prefetch_count=10)]

    def on_task(self, body, message):
        """Handle a message. Its tokens are taken when this is called."""
        report(message.delivery_info["routing_key"], body)
        message.ack()
        if len(handled) == len(sent):
            self.should_stop = True


# -- everything below only sends messages, and measures ---------------------------------------------

BROKER = os.environ.get("BROKER", "memory://")
handled = []  # (queue, tokens, number, moment)
sent = [("emails", number, 1) for number in range(16)]
sent += [("uploads", number, (2, 5, 1, 8, 3)[number % 5]) for number in range(24)]
sent += [("clicks", number, 1) for number in range(8)]
started = time.monotonic()


def report(queue, body):
    now = time.monotonic()
    handled.append((queue, body["size"], body["number"], now))
    what = f"{body['size']} MB" if queue == "uploads" else ""
    print(f"{now - started:6.2f} s  {queue:8} {body['number']:3}  {what}", flush=True)


def send_messages(connection):
    producer = connection.Producer()
    for queue, number, size in sent:
        body = {"number": number, "size": size}
        producer.publish(body, routing_key=queue, declare=[Queue(queue)])


def most_over(messages, bucket):
    """Return by how many tokens the worst window exceeds capacity + rate × its length."""
    worst = 0.0
    for first, (_, _, _, begin) in enumerate(messages):
        used = 0
        for _, tokens, _, end in messages[first:]:
            used += tokens
            allowed = bucket.capacity + bucket.tokens_per_second * (end - begin)
            worst = max(worst, used - allowed)
    return worst


def print_table():
    """Compare the limits with what was handled. Return whether they held."""
    fine = sorted((queue, number) for queue, _, number, _ in handled) == sorted(
        (queue, number) for queue, number, _ in sent
    )
    print(f"\n{'':8} {'burst':>6} {'set rate':>9} {'measured':>9} {'messages':>9} {'last after':>11}")
    for queue, bucket in (("emails", emails), ("uploads", megabytes), ("clicks", None)):
        messages = [message for message in handled if message[0] == queue]
        last = messages[-1][3] - started
        if bucket is None:
            print(f"{queue:8} {'-':>6} {'-':>9} {'-':>9} {len(messages):9} {last:9.2f} s")
            continue
        used, burst = 0, 0
        while used < bucket.capacity:
            used += messages[burst][1]
            burst += 1
        after = messages[burst - 1 :]
        rate = sum(tokens for _, tokens, _, _ in after[1:]) / (after[-1][3] - after[0][3])
        print(
            f"{queue:8} {bucket.capacity:6g} {bucket.tokens_per_second:7g}/s {rate:7.2f}/s"
            f" {len(messages):9} {last:9.2f} s"
        )
        # A message notes its time a moment after it was let go, on a busy machine 0.25 s.
        fine = fine and most_over(messages, bucket) <= bucket.tokens_per_second * 0.25
    return fine


def main():
    options = {"polling_interval": 0.02} if BROKER == "memory://" else {}  # the default is 1 s
    with Connection(BROKER, transport_options=options) as connection:
        send_messages(connection)
        print(f"Sent {len(sent)} messages at once; they take about 8 s.\n")
        Worker(connection).run()
    fine = print_table()
    print("\nEvery limit was held." if fine else "\nA limit was exceeded, or a message lost!")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
