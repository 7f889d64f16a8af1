"""Settling what a job was charged."""

import pytest

from rate_limiter import TokenBucket
from rate_limiter.celery import Charge
from rate_limiter.gating.declared import new_limit
from rate_limiter.gating.limit import Demand

bucket = TokenBucket(10, 0.001)


@pytest.fixture
def charge():
    charge = Charge()
    charge.add([Demand(bucket, 5, new_limit(bucket, name="tank"))])
    return charge


@pytest.mark.parametrize(("actual", "tokens"), [(3, 3), ("2.5", 2.5), (0, 0), ("0", 0), (12, 12)])
def test_a_figure_is_a_number_or_a_number_in_text(charge, actual, tokens):
    """What a remote answers as text counts like the number."""
    charge.settle(actual)
    assert charge.tokens() == tokens


@pytest.mark.parametrize("actual", [None, "many", -1, "-1", float("nan"), [3], 0j])
def test_a_figure_that_is_no_number_fails_no_job(charge, actual, caplog):
    """The work is done when it is settled: such a figure is logged, and the estimate stays."""
    charge.settle(actual)
    assert charge.tokens() == 5
    assert "Limit tank: settle(): " in caplog.text
    assert "the estimate stays" in caplog.text
