"""The prefetch count over held jobs, and the order in which they go back, without a broker."""

import uuid

import pytest
from kombu import Connection
from kombu.common import QoS

from rate_limiter.broker.lease import Lease
from rate_limiter.broker.prefetch import Prefetch
from rate_limiter.broker.restore import give_back, restore_in_order
from rate_limiter.testing import ManualClock


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def counts():
    """Return the prefetch counts that the broker was sent."""
    return []


class ClampedQoS(QoS):
    """What Celery has under worker_eta_task_limit = 10, with every kombu."""

    def increment_eventually(self, n=1):  # noqa: D102
        self.value = min(10, self.value + n)
        return self.value


def prefetch_of(counts, clock, own=8, kind=QoS):
    def send(prefetch_count):
        counts.append(prefetch_count)

    qos = kind(send, own)
    return qos, Prefetch(qos, clock)


@pytest.mark.parametrize("own", [1, 8, 40])
def test_few_held_jobs_raise_the_count_by_their_number(counts, clock, own):
    """The count is its own plus the number of held jobs, and no more."""
    qos, prefetch = prefetch_of(counts, clock, own)
    for held in range(1, 33):
        assert prefetch.follow(held, 100)
        assert qos.value == own + held


def test_many_held_jobs_raise_the_count_in_steps(counts, clock):
    """A thousand held jobs, one after the other, cost few round trips, and reserve at most a quarter more."""
    qos, prefetch = prefetch_of(counts, clock)
    for held in range(1, 1001):
        prefetch.follow(held, 1000)
        prefetch.update()
        assert 8 + held <= qos.value <= 8 + held + held / 4
        assert qos.value <= 8 + 1000
    assert len(counts) < 60


def test_the_count_is_lowered_when_jobs_leave(counts, clock):
    """With the last job at once; before that once a second, so that jobs that come and go cost little."""
    qos, prefetch = prefetch_of(counts, clock)
    prefetch.follow(5, 100)
    assert prefetch.follow(4, 100)
    assert qos.value == 8 + 4
    assert not prefetch.follow(2, 100)
    assert not prefetch.follow(4, 100)
    clock.advance(0.99)
    assert not prefetch.follow(2, 100)
    clock.advance(0.02)
    assert prefetch.follow(2, 100)
    assert qos.value == 8 + 2
    assert prefetch.follow(0, 100)
    assert qos.value == 8


def test_a_count_that_is_clamped_comes_back_to_where_it_was(counts, clock):
    """Only what was really added is taken away again."""
    qos, prefetch = prefetch_of(counts, clock, kind=ClampedQoS)
    for held in (1, 2, 3, 50):
        prefetch.follow(held, 100)
    assert qos.value == 10
    prefetch.follow(0, 100)
    assert qos.value == 8


@pytest.mark.parametrize("own", [65_500, 65_535])
def test_the_count_stays_in_16_bits(counts, clock, own):
    """Above 65,535 kombu would send "no limit": the count ends there, and comes back to where it was."""
    qos, prefetch = prefetch_of(counts, clock, own)
    for held in (20, 1000):
        prefetch.follow(held, 1000)
        prefetch.update()
    assert qos.value == 65_535
    prefetch.follow(0, 1000)
    prefetch.update()
    assert qos.value == own
    assert 0 not in counts


def test_a_change_is_sent_once(counts, clock):
    """The broker is told of a change, and of nothing else."""
    _, prefetch = prefetch_of(counts, clock)
    for held in (3, 3, 3):
        prefetch.follow(held, 100)
        prefetch.update()
    assert counts == [11]


def test_jobs_that_arrive_with_the_answer_raise_the_count_again(clock):
    """RabbitMQ's answer brings further jobs, which are held: the count follows before `update` returns."""
    counts = []

    def answer(prefetch_count):
        counts.append(prefetch_count)
        prefetch.follow(min(prefetch_count, 30), 30)

    prefetch = Prefetch(QoS(answer, 8), clock)
    prefetch.follow(8, 30)
    prefetch.update()
    assert counts == [16, 24, 32, 38]


def consumed(connection, count):
    """Return the name of a new queue, and the messages that were consumed from it, oldest first."""
    queue = connection.SimpleQueue(f"queue-{uuid.uuid4()}")
    for number in range(count):
        queue.put(number)
    return queue.queue.name, [queue.get(timeout=5) for _ in range(count)]


def waiting(connection, name):
    """Return what is in a queue, first to be given out first."""
    found = []
    with connection.channel() as channel:
        while (message := channel.basic_get(name, no_ack=True)) is not None:
            found.append(channel.message_to_python(message).payload)
    return found


@pytest.mark.parametrize("calls", [1, 2])
def test_jobs_are_put_back_in_order(calls):
    """Where kombu puts jobs back, they keep their order; what is acknowledged stays away."""
    with Connection("memory://") as connection:
        name, messages = consumed(connection, 6)
        channel = messages[0].channel
        channel.do_restore = True  # as the transports have it that survive the process
        for _ in range(calls):
            restore_in_order(channel)
        messages[3].ack()
        channel.close()
        assert waiting(connection, name) == [0, 1, 2, 4, 5]


def test_memory_gets_held_jobs_back_in_order():
    """Kombu puts nothing back there: the held jobs go back in the order in which they came."""
    with Connection("memory://") as connection:
        name, messages = consumed(connection, 6)
        held = [messages[number] for number in (4, 1, 3)]
        give_back(messages[0].channel, held)
        messages[0].channel.close()
        give_back(messages[0].channel, held)  # nothing can go back any more
        assert waiting(connection, name) == [1, 3, 4]


def test_other_brokers_have_no_leases():
    """Renewing is asked for nowhere but on Redis."""
    with Connection("memory://") as connection:
        assert Lease(connection.default_channel).interval is None
