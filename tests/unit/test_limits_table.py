"""The table of `celery limits`, from replies as workers give them."""

import pytest

from rate_limiter.cli.table import Table, rate_text


def limit(**changes):
    """Return what a worker says of a limit."""
    bucket = {"kind": "TokenBucket", "capacity": 10, "rate": 2, "tokens": 1.23456, "paused": 0.0}
    bucket |= changes.pop("bucket", {})
    return {
        "tasks": ["jobs.send"],
        "queue": None,
        "enforced": "at the gate",
        "held": 3,
        "buckets": [bucket],
        "when_limited": "wait",
        "shadow": False,
        "admitted": 5.0,
        "tokens": 50.0,
        "refused": 1.0,
        "failed": 0.0,
        "skipped": 0.0,
        "returned": 0.0,
        "waited": 9.0,
        "longest": 4.5678,
        "changed": None,
        **changes,
    }


def test_a_row_for_each_limit_and_worker():
    """Columns are aligned, numbers at the right; the name of a limit stands in its first row."""
    slow = limit(bucket={"rate": 1 / 60, "capacity": 1}, enforced="in the task", held=0)
    lines = Table({"b@host": {"emails": limit()}, "a@host": {"slow": slow, "emails": limit()}}).lines()
    assert lines == [
        "limit   worker  rate  burst  tokens  held  admitted  refused  failed  longest wait  state",
        "emails  a@host   2/s     10    1.23     3         5        1       0        4.57 s",
        "        b@host   2/s     10    1.23     3         5        1       0        4.57 s",
        "slow    a@host   1/m      1    1.23     0         5        1       0        4.57 s  in the task",
    ]


def test_what_else_is_said():
    """A pause, a change, workers without an answer, and limits that differ between workers."""
    changed = {
        "at": "2026-11-25T10:00:00+00:00",
        "what": "5 tokens_per_second (was 2)",
        "reason": "busy",
    }
    one = limit(bucket={"rate": 5, "paused": 12.3456}, changed=changed)
    lines = Table(
        {"a@host": {"emails": one}, "b@host": {"emails": limit()}, "c@host": {"error": "no"}}
    ).lines()
    assert lines[1].endswith(
        "  paused for 12.3 s, changed 2026-11-25T10:00:00+00:00: 5 tokens_per_second (was 2) (busy)"
    )
    assert lines[3:] == [
        "c@host: no",
        "Limit emails differs between workers. a@host: 5/s with burst 10; b@host: 2/s with burst 10",
    ]


def test_other_kinds_of_buckets():
    """Keys are counted; of several buckets the slowest is shown; a callable's bucket is not known."""
    keys = limit(buckets=[{"kind": "BucketPerKey", "capacity": 4, "rate": 1, "keys": 17}])
    several = limit()
    several["buckets"] = [{**several["buckets"][0], "rate": 9}, several["buckets"][0]]
    lines = Table({"a@host": {"keys": keys, "several": several, "called": limit(buckets=[])}}).lines()
    columns = [line.split()[:5] for line in lines[1:]]
    assert columns == [
        ["called", "a@host", "by", "job", "3"],
        ["keys", "a@host", "1/s", "4", "17"],
        ["several", "a@host", "2/s", "10", "1.23"],
    ]


def test_a_watched_table():
    """The current rate since the table before, with bars; a limit that is new has none yet."""
    first = Table({"a@host": {"emails": limit()}}, watched=True)
    second = Table(
        {"a@host": {"emails": limit(tokens=52.0), "new": limit(held=6)}}, watched=True, before=first
    )
    second.at = first.at + 2
    assert "now" in first.lines()[0]
    lines = second.lines()
    assert "1/s █████░░░░░" in lines[1]
    assert "3 █████░░░░░" in lines[1]
    assert lines[2].count("█") == 10


@pytest.mark.parametrize(
    ("replies", "says"),
    [
        ({"a@host": {"error": "it is down"}}, "a@host: it is down"),
        ({"a@host": {}}, "No worker has limits."),
        ({}, "No worker has answered."),
    ],
)
def test_no_limits(replies, says):
    """Without any limit it says so, or why."""
    assert Table(replies).lines() == [says]


def test_a_limit_of_all_workers():
    """A rate that is in Redis is told from one that each worker has for itself."""
    in_redis = limit(bucket={"declared": {"capacity": 10, "rate": 2}, "stored": None, "outage": False})
    together, alone = Table({"a@host": {"emails": in_redis, "slow": limit()}}).lines()[1:]
    assert together.endswith("  one rate for all workers")
    assert not alone.endswith("for all workers")


def test_a_limit_named_error():
    """A name may be any text."""
    assert len(Table({"a@host": {"error": limit()}}).lines()) == 2


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (5, "5/s"),
        (0.5, "30/m"),
        (2 / 3600, "2/h"),
        (1 / 86400, "1/d"),
        (0.1 / 86400, "0.1/d"),
        (1e6, "1e+06/s"),
    ],
)
def test_rates(rate, text):
    """In the unit that reads best."""
    assert rate_text(rate) == text
