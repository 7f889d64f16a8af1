"""When the Celery gate looks at what it holds, with a timer that a manual clock moves."""
# ruff: noqa: D102 - the timer is Celery's

import math
import select
import threading
from types import SimpleNamespace

import pytest
from kombu.asynchronous import Hub
from kombu.transport.base import Transport

from rate_limiter.celery.loop import Loop, forget_lost_reads
from rate_limiter.testing import ManualClock


class Timer:
    """Celery's timer, moved by hand."""

    def __init__(self, clock):
        self.clock = clock
        self.entries = []

    def call_at(self, moment, call):
        self.entries.append(entry := (moment, call))
        return entry

    def cancel(self, entry):
        if entry in self.entries:
            self.entries.remove(entry)

    @property
    def next(self):
        return min((moment for moment, _ in self.entries), default=math.inf)

    def fire(self):
        """Go on until the next entry, and fire it."""
        entry = min(self.entries, key=lambda entry: entry[0])
        self.entries.remove(entry)
        self.clock.now = max(self.clock.now, entry[0])
        entry[1]()


class Lab:
    """A loop on an event loop that other threads can wake."""

    def __init__(self, clock, **hub):
        self.due = math.inf
        self.worked = []
        self.clock = clock
        self.timer = Timer(clock)
        self.soon = []
        self.raises = False
        consumer = SimpleNamespace(
            hub=SimpleNamespace(**hub), timer=self.timer, pool=None, call_soon=self.soon.append
        )
        self.loop = Loop(consumer, lambda: self.due, self.work, lambda: None)

    def work(self):
        self.worked.append(self.clock.now)
        if self.raises:
            raise OSError("no broker")


@pytest.fixture
def clock(monkeypatch):
    clock = ManualClock()
    monkeypatch.setattr("rate_limiter.celery.loop.monotonic", clock)
    return clock


@pytest.fixture
def lab(clock):
    return Lab(clock, _waker=None)


def test_sleeps_until_the_moment(lab):
    """One timer, for the next moment; an earlier one takes its place, a later one does not."""
    lab.due = 60
    lab.loop.look()
    lab.due = 20
    lab.loop.look()
    lab.due = 40
    lab.loop.look()
    assert [moment for moment, _ in lab.timer.entries] == [20]
    lab.timer.fire()
    assert (lab.worked, lab.timer.next) == ([20], 40)


def test_work_that_is_due_is_not_put_off(lab, clock):
    """However often the gate looks, a timer that is due already stays the one that fires first."""
    for _ in range(10):
        lab.loop.look()
        lab.due = clock.now
        lab.loop.look()
        clock.advance(0.0003)
    lab.timer.fire()
    assert lab.worked[0] <= 0.003


def test_nothing_due_is_no_timer(lab):
    """A gate that holds nothing has no timer."""
    lab.loop.look()
    assert lab.timer.entries == []


def test_another_thread_wakes_the_loop(lab):
    """The timer is set in the loop's own thread, where the moment has become an earlier one."""
    lab.due = 60
    lab.loop.look()
    lab.due = 0
    thread = threading.Thread(target=lab.loop.wake)
    thread.start()
    thread.join()
    assert lab.timer.next == 60
    (look,) = lab.soon
    look()
    assert lab.timer.next == 0.001


def test_a_signal_handler_wakes_the_loop_while_it_looks(lab, monkeypatch):
    """A moment that becomes earlier while the timer is being set is not overlooked."""
    lab.due = 60
    cancel = lab.loop._cancel

    def interrupted():
        if lab.due == 60:  # the handler runs here
            lab.due = 0
            lab.loop.wake()
        cancel()

    monkeypatch.setattr(lab.loop, "_cancel", interrupted)
    lab.loop.look()
    assert [moment for moment, _ in lab.timer.entries] == [0.001]


def test_work_that_raises_is_not_the_last(lab):
    """A timer is set again also where the work has failed."""
    lab.due = 5
    lab.loop.look()
    lab.raises, lab.due = True, 8
    with pytest.raises(OSError, match="no broker"):
        lab.timer.fire()
    assert lab.timer.next == 8


def test_another_thread_wakes_an_older_kombu(clock):
    """The event loop of kombu before 5.7 is woken through a pair of sockets."""
    readers = {}
    lab = Lab(clock, add_reader=readers.__setitem__, remove_reader=readers.pop)
    lab.due = 60
    lab.loop.look()
    lab.due = 0.5
    thread = threading.Thread(target=lab.loop.wake)
    thread.start()
    thread.join()
    ((reader, on_readable),) = readers.items()
    assert select.select([reader], [], [], 5)[0] == [reader]
    on_readable(reader)
    assert lab.timer.next == 0.5
    lab.loop.stop()
    assert not readers


def test_the_next_connection_does_not_end_with_the_lost_one():
    """What kombu's loop still wants to read from a lost connection is forgotten; all else in it is done."""
    hub, done = Hub(), []
    lost = SimpleNamespace(connected=False, drain_events=None)
    hub.call_soon(Transport(None)._make_reader(lost), hub)
    hub.call_soon(done.append, 1)
    forget_lost_reads(hub)
    hub.run_once()
    assert done == [1]
    hub.close()
