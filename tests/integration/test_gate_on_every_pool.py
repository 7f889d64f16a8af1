"""What the gate promises on each broker and each pool."""

import pytest
from harness import at_once, wait_for

POOLS = ["prefork", "threads", "solo", "gevent"]


@pytest.mark.parametrize("pool", POOLS)
def test_limited_jobs_keep_their_rate_and_others_pass_by(lab, pool):
    """Limited jobs run once, in order, never too fast; unlimited ones behind them do not wait."""
    for number in range(60):
        lab.send("limited", number)
    for number in range(20):
        lab.send("free", number)
    with lab.worker(pool):
        lab.wait_for_runs("limited", 60)
        free = lab.log("free")
        wait_for(lambda: lab.log("concurrency")[-1].value == "end")
    numbers = lab.runs("limited")
    assert sorted(numbers) == list(range(60))
    assert len(lab.taken("limited")) == 60
    lab.assert_bound("limited", capacity=2, rate=20)
    assert len(free) == 20
    assert free[-1].at < lab.log("limited")[30].at
    if pool == "solo":
        assert numbers == list(range(60))
        assert at_once(lab.log("concurrency")) == 1
    else:  # two slots: neighbours may overtake each other after the gate
        assert all(abs(place - number) <= 4 for place, number in enumerate(numbers))
