"""What a worker or consumer depends on is away for a while: all jobs run, and the worker lives."""

import contextlib
import time
from collections import Counter

import pytest
import redis
from conftest import KEEPS_DATA
from harness import Lab, wait_for
from kombu.asynchronous import Hub
from kombu_lab import Broker, Worker, running
from limits import SHORT_LEASE, break_connections, control, held, limit, start, stats, unacknowledged

from rate_limiter import TokenBucket
from rate_limiter.broker.restore import Leftovers, restore_in_order
from rate_limiter.kombu import Gate


@pytest.fixture
def restartable(own_redis):
    """Return a Redis that can be restarted."""
    return own_redis(*KEEPS_DATA)


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_worker_outlives_redis(restartable, tmp_path, pool):
    """Redis restarts while jobs are held: they are back at once, and run once, in order."""
    lab = Lab(tmp_path, restartable.url)
    for number in range(10):
        lab.send("job", number)
    with start(lab, pool=pool, limits=(limit(rate=4, max_held=50),)) as worker:
        lab.wait_for_runs("job", 3)
        time.sleep(0.1)  # between two jobs, so that no acknowledgement is under way
        restartable.restart()
        wait_for(lambda: set(lab.runs("job")) == set(range(10)))
        wait_for(lambda: not unacknowledged(lab))
        assert worker.running
    assert "jobs back into their queues that Redis had not got back" in worker.output
    assert list(dict.fromkeys(lab.runs("job"))) == list(range(10))
    # Before kombu 5.7 the pool's threads cannot wake the event loop, which is to acknowledge the job.
    late = pool == "threads" and not hasattr(Hub, "_create_waker")
    assert len(lab.runs("job")) <= 10 + late
    lab.assert_bound("job", capacity=1, rate=4)
    lab.close()


def test_a_kombu_consumer_outlives_redis(restartable):
    """Redis restarts while messages are held: they are back at once, and run once, in order."""
    broker = Broker(restartable.url)
    queue = broker.queue()
    broker.send(queue, *range(10))
    gate = Gate(max_held=50)
    gate.limit(queue.name, bucket=TokenBucket(1, 4))
    with running(Worker(broker, gate, queue)) as worker:
        worker.wait_for_runs(3)
        time.sleep(0.1)
        restartable.restart()
        wait_for(lambda: set(worker.ran) == set(range(10)))
        wait_for(lambda: not broker.unacknowledged())
    assert worker.ran == list(range(10))
    assert worker.connects == 2
    broker.close()


class Lost:
    """A channel that has got messages, and whose connection is taken apart before it closes."""

    def __init__(self, broker, queue, count, **options):
        self.connection = broker.connection(transport_options=options)
        self.channel = self.connection.channel()
        self.leftovers, self.messages = Leftovers(), []
        self.leftovers.put_back(self.channel)
        restore_in_order(self.channel)
        bound = queue(self.channel)
        bound.declare()
        for number in range(count):
            self.connection.Producer().publish(number, routing_key=queue.name)
        for _ in range(count):
            self.messages.append(bound.get())

    @property
    def waiting(self):
        """The messages in the queue, the first to come first."""
        with self.connection.clone() as connection:
            queue = connection.SimpleQueue(self.messages[0].delivery_info["routing_key"])
            found = []
            with contextlib.suppress(queue.Empty):
                while True:
                    found.append(queue.get_nowait().payload)
            queue.close()
        return found

    def lose(self):
        """Take the connection apart, as Celery does where a channel could not be closed."""
        transport = self.channel.connection
        transport.client = None
        self.channel._disconnect_pools()
        self.channel.close()

    def put_back(self, **options):
        """Put back over a new connection."""
        with self.connection.clone() as connection:
            self.leftovers.put_back(connection.channel(), **options)


@pytest.mark.parametrize("options", [{}, {"global_keyprefix": "prefix-"}], ids=["plain", "prefix"])
def test_what_is_put_back_over_a_new_connection(redis_broker, options):
    """It is what nobody has acknowledged or got since, but for what runs; in order, and once only."""
    lost = Lost(redis_broker, redis_broker.queue(), 7, **options)
    acknowledged, running_one, elsewhere = (lost.messages[n].delivery_tag for n in (1, 3, 5))
    lost.messages[1].ack()
    lost.lose()  # and nothing is raised
    prefix = options.get("global_keyprefix", "")
    with redis.Redis.from_url(redis_broker.url) as client:
        assert client.zscore(f"{prefix}unacked_index", acknowledged) is None
        client.zadd(f"{prefix}unacked_index", {elsewhere: time.time() + 1}, xx=True)
        assert lost.leftovers.collect([running_one]) == 5
        lost.put_back()
        assert set(client.hkeys(f"{prefix}unacked")) == {running_one.encode(), elsewhere.encode()}
        assert lost.leftovers.collect() == 0
        assert lost.waiting == [0, 2, 4, 6]
        client.flushdb()


def test_nothing_is_put_back_that_kombu_has_put_back(redis_broker):
    """A channel that closes as it should leaves nothing over."""
    lost = Lost(redis_broker, redis_broker.queue(), 3)
    lost.channel.close()
    assert lost.leftovers.collect() == 0
    assert lost.waiting == [0, 1, 2]


def alive_after(lab, pool, lose):
    """Lose the connection three times while jobs are held and parked; return how many objects there are then."""
    # The lane of the second is consumed: its next token is due within a minute.
    slow = limit("job", 1, 1 / 3600), limit("other", 1, 1 / 50, overflow="park")
    with start(lab, pool=pool, limits=slow) as worker:
        for number in range(5):
            lab.send("job", number)
            lab.send("other", number)
        for lost in range(4):
            # Not by asking the worker: the connections of the test are broken too.
            wait_for(lambda: worker.output.count("Limit job: jobs begin to wait") > lost)  # noqa: B023
            if lost < 3:
                lose()
        return control(lab, worker, "alive")


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_lost_connection_stays_in_no_timer(lab, pool, request):
    """However many are lost, a cancelled timer keeps none in memory: what is there is of the last two at most."""
    alive = alive_after(lab, pool, lambda: break_connections(lab, request))
    assert len(alive) == 4
    assert max(alive.values()) <= 2


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_channel_that_could_not_be_closed_is_not_kept(restartable, tmp_path, pool):
    """Redis is away as the connection is lost, so kombu closes no more channels: they go from memory all the same."""
    lab = Lab(tmp_path, restartable.url)

    def be_away():
        restartable.kill()
        time.sleep(1.5)
        restartable.start()

    alive = alive_after(lab, pool, be_away)
    assert len(alive) == 4
    assert max(alive.values()) <= 2
    lab.close()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_held_jobs_block_no_others_after_a_reconnect(rabbitmq_lab, pool, request):
    """RabbitMQ: Celery lowers the prefetch count as a job runs; held jobs take up nothing of it."""
    lab = rabbitmq_lab
    with start(lab, pool=pool, limits=(limit("job", 1, 1 / 3600),)) as worker:
        done = lab.folder / "done"
        lab.send("busy", 60, str(done))  # rabbitmqctl takes seconds
        lab.wait_for_runs("concurrency", 1)
        for number in range(7):
            lab.send("job", number)
        wait_for(lambda: held(lab, worker) == 6)
        break_connections(lab, request)
        wait_for(lambda: "Temporarily reducing the prefetch count" in worker.output)
        for number in range(20):
            lab.send("other", number)
        done.touch()  # Celery 5.5 may have given its child another job after the reconnect
        lab.wait_for_runs("other", 20)
        wait_for(lambda: "Prefetch count has been restored to the maximum of 8" in worker.output)
        wait_for(lambda: stats(lab, worker)["prefetch_count"] == 8 + 6)


def test_jobs_that_cannot_be_ended_block_no_others(lab):
    """With the result backend down more jobs are dropped than are prefetched; others go on."""
    down = lab.folder / "runs.down"
    with start(lab, result_backend="cache+memory://", task_ignore_result=False) as worker:
        for number in range(2):
            lab.send("dropped", number)
        lab.wait_for_runs("dropped", 2)
        down.touch()
        for number in range(20):
            lab.send("dropped", number)
        for number in range(20):
            lab.send("other", number)
        assert sorted(lab.wait_for_runs("other", 20)) == list(range(20))
        assert worker.output.count("Dropped ") == 0
        down.unlink()
        wait_for(lambda: worker.output.count("Dropped ") == 20)
        wait_for(lambda: stats(lab, worker)["prefetch_count"] == 8)


def test_jobs_with_an_eta_keep_their_lease(redis_lab):
    """Redis: what was sent back, or has an ETA, waits longer than visibility_timeout and runs once."""
    lab = redis_lab
    retry = limit(rate=1, when_limited="retry")
    options = {"broker_transport_options": SHORT_LEASE, "worker_prefetch_multiplier": 20}
    with start(lab, pool="prefork", limits=(retry,), **options):
        for number in range(7):
            lab.send("job", number)
        lab.send("other", 0, countdown=6)
        lab.wait_for_runs("job", 7)
        lab.wait_for_runs("other", 1)
        time.sleep(1.5)  # for a second run of one
    assert Counter(lab.runs("job")) == Counter(range(7))
    assert lab.runs("other") == [0]
