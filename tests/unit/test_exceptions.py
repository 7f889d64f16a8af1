"""`RateLimitExceeded`: what it says, and that it survives being sent."""

import copy
import json
import pickle

import pytest

from rate_limiter import RateLimitExceeded, exceptions

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
