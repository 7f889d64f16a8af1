"""Checks of arguments: what a number must be, and what is said of one that is not."""

import math
import threading
from numbers import Real

__all__ = ["not_negative", "positive", "whole"]


def positive(name: str, value: float) -> float:
    """Return ``value`` as a float, or raise what is wrong with it.

    Raises:
        ValueError: It is not above 0 (then with the documented text), or is not finite.
        TypeError: It is not a number.

    """
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number (int or float), not {value!r}")
    if value <= 0:
        raise ValueError(f"{name} must be positive")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    if not number:
        raise ValueError(f"{name} must be positive")
    return number


def not_negative(timeout: float) -> float:
    """Return a ``timeout`` in seconds, or raise what is wrong with it."""
    if not isinstance(timeout, Real):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
    if not timeout >= 0:
        raise ValueError(f"timeout must be 0 or more seconds, or None, not {timeout!r}")
    return float(min(timeout, threading.TIMEOUT_MAX))


def whole(name: str, value: int) -> int:
    """Return ``value``, or raise what is wrong with it as a count of jobs."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, not {value!r}")
    return value
