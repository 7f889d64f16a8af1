"""`RateLimitExceeded` and `RetryAfter`: what they say, and that they survive being sent."""

import copy
import json
import math
import pickle
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import pytest

from rate_limiter import RateLimitExceeded, RetryAfter, exceptions

# the arguments, and what they make: (message, retry_after)
MADE = [
    ((), ("rate limit exceeded", None)),
    (("try later",), ("try later", None)),
    (("try later", 2.5), ("try later", 2.5)),
    (("", 0.0), ("", 0.0)),
]


@pytest.mark.parametrize(("arguments", "made"), MADE)
def test_it_says(arguments, made):
    """Its text is the message, and nothing else; the delay is an attribute."""
    error = RateLimitExceeded(*arguments)
    assert (str(error), error.message, error.retry_after) == (made[0], *made)
    assert error.args == made


def test_keywords():
    """Both arguments go by name."""
    error = RateLimitExceeded(retry_after=3.0, message="no")
    assert (str(error), error.retry_after) == ("no", 3.0)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol):
    """It comes out of a pickle, or a copy, as it went in."""
    for sent in (
        pickle.loads(pickle.dumps(RateLimitExceeded("try later", 2.5), protocol)),
        copy.deepcopy(RateLimitExceeded("try later", 2.5)),
    ):
        assert type(sent) is RateLimitExceeded
        assert (str(sent), sent.message, sent.retry_after) == ("try later", "try later", 2.5)


def test_rebuilt_from_its_args():
    """The JSON result backends of Celery rebuild an exception from its ``args``."""
    sent = RateLimitExceeded(*json.loads(json.dumps(RateLimitExceeded("try later", 2.5).args)))
    assert (str(sent), sent.retry_after) == ("try later", 2.5)


def test_it_is_an_ordinary_exception():
    """It is caught as `Exception`, not by accident as a bad argument or a timeout of something else."""
    assert RateLimitExceeded.__bases__ == (Exception,)
    assert exceptions.RateLimitExceeded is RateLimitExceeded


# -- RetryAfter ------------------------------------------------------------------------------------

SECONDS = [
    *((0, 0.0), (0.0, 0.0), (2, 2.0), (2.5, 2.5), (True, 1.0)),
    *((Decimal("1.5"), 1.5), (Decimal(0), 0.0), (Fraction(1, 2), 0.5)),
    *(("0", 0.0), ("2", 2.0), ("120", 120.0), (" 2.5 ", 2.5), ("1e3", 1000.0)),
]


@pytest.mark.parametrize(("given", "seconds"), SECONDS, ids=repr)
def test_retry_after(given, seconds):
    """It takes numbers of every kind, numbers in text as in an HTTP header, and 0: again at once."""
    error = RetryAfter(given)
    assert (error.retry_after, error.args) == (seconds, (seconds,))
    assert type(error.retry_after) is float
    assert str(error) == f"the remote asks for a pause of {seconds:g} s"


DATES = ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"]


@pytest.mark.parametrize("form", DATES)
@pytest.mark.parametrize(("ahead", "least", "most"), [(100, 98, 100), (-100, 0, 0), (0, 0, 0)])
def test_retry_after_a_date(form, ahead, least, most):
    """It takes an HTTP date in each of the three forms that HTTP has; one in the past is 0."""
    moment = datetime.now(UTC) + timedelta(seconds=ahead)
    error = RetryAfter(moment.strftime(form))
    assert least <= error.retry_after <= most
    assert RetryAfter(*error.args).retry_after == error.retry_after


@pytest.mark.parametrize(
    "text", ["", "soon", "-1", "nan", "inf", "1,5", "Wed, 41 Oct 2026 07:28:00 GMT", "9" * 400, "\0"]
)
def test_retry_after_of_bad_text(text):
    """Text that is neither seconds nor a date is refused: which argument, its value, what it must be."""
    with pytest.raises(ValueError, match="^seconds must be 0 or more, or an HTTP date") as raised:
        RetryAfter(text)
    assert str(raised.value).endswith(f"not {text!r}")


@pytest.mark.parametrize("number", [-1, -0.5, Decimal(-1), Fraction(-1, 2), -math.inf])
def test_retry_after_of_a_negative_number(number):
    """0 or more."""
    with pytest.raises(ValueError, match="^seconds must be 0 or more, not "):
        RetryAfter(number)


@pytest.mark.parametrize("number", [math.nan, math.inf, Decimal("nan"), Decimal("snan"), 10**400])
def test_retry_after_without_an_end(number):
    """A pause is finite."""
    with pytest.raises(ValueError, match="^seconds must be a finite number, not "):
        RetryAfter(number)


@pytest.mark.parametrize("thing", [None, b"2", [2], 0j])
def test_retry_after_of_no_number(thing):
    """An answer without the header gives None."""
    with pytest.raises(TypeError, match="^seconds must be a number"):
        RetryAfter(thing)


@pytest.mark.parametrize("given", [0, 2.5, Decimal("2.5"), "120", "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_retry_after_is_rebuilt(given):
    """It comes out of pickle and of JSON as it went in, however much later that is."""
    error = RetryAfter(given)
    for rebuilt in (
        pickle.loads(pickle.dumps(error)),
        copy.copy(error),
        RetryAfter(*json.loads(json.dumps(error.args))),
    ):
        assert type(rebuilt) is RetryAfter
        assert (rebuilt.args, rebuilt.retry_after) == (error.args, error.retry_after)
        assert str(rebuilt) == str(error)
