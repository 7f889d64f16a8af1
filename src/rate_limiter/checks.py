"""Checks of arguments: the numbers that are accepted, and the errors about all others."""

import math
import threading
from decimal import Decimal
from numbers import Real
from typing import NoReturn

__all__ = ["initial_tokens", "positive", "timeout_seconds", "too_many", "whole", "zero_or_more"]


def positive(name: str, value: float, *, documented: bool = False) -> float:
    """Return a number above 0 as a float.

    Args:
        name: The argument, for the error.
        value: An ``int``, ``float``, ``Decimal``, ``Fraction`` or any other real number.
        documented: The API document fixes the text "… must be positive" for this argument, to the
            letter, so the value is not added.

    Raises:
        ValueError: It is not above 0 (as a float: a tiny fraction may become 0), or is not finite.
        TypeError: It is not a real number.

    """
    number = _number(name, value)
    if number <= 0.0:
        text = f"{name} must be positive"
        raise ValueError(text if documented else f"{text}, not {_shown(value)}")
    if not math.isfinite(number):
        _not_finite(name, value)
    return number


def zero_or_more(name: str, value: float) -> float:
    """Return a number that is 0 or more as a float.

    Raises:
        ValueError: It is below 0, or is not finite.
        TypeError: It is not a real number.

    """
    number = _number(name, value)
    if number < 0.0:
        raise ValueError(f"{name} must be 0 or more, not {_shown(value)}")
    if not math.isfinite(number):
        _not_finite(name, value)
    return number


def initial_tokens(initial: float | None, capacity: float) -> float:
    """Return the tokens that a new bucket starts with, as a float. ``None``: its capacity.

    Raises:
        ValueError: It is below 0, above the capacity, or not finite.
        TypeError: It is not a real number.

    """
    if initial is None:
        return capacity
    tokens = zero_or_more("initial", initial)
    if tokens > capacity:
        raise ValueError(f"initial must be at most the capacity {capacity:g}, not {_shown(initial)}")
    return tokens


def timeout_seconds(timeout: float) -> float:
    """Return a ``timeout`` as a float: seconds, 0 or more; infinity becomes the longest timeout.

    Raises:
        ValueError: It is below 0, or NaN.
        TypeError: It is not a real number.

    """
    if not isinstance(timeout, (Real, Decimal)):
        raise TypeError(f"timeout must be a number of seconds or None, not {_shown(timeout)}")
    seconds = _number("timeout", timeout)
    if not seconds >= 0.0:
        raise ValueError(f"timeout must be 0 or more seconds, or None, not {_shown(timeout)}")
    return min(seconds, threading.TIMEOUT_MAX)


def whole(name: str, value: int) -> int:
    """Return a count of jobs, 1 or more.

    Raises:
        ValueError: It is below 1.
        TypeError: It is not an ``int``, or is a ``bool``.

    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, not {_shown(value)}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, not {_shown(value)}")
    return value


def too_many(tokens: float, capacity: float) -> ValueError:
    """Return the error for more tokens than a bucket can hold."""
    return ValueError(f"tokens must be at most the capacity {capacity:g}, not {tokens:.15g}")


def _number(name: str, value: float) -> float:
    """Return any real number as a float: infinity if it is too large for one.

    A number is never kept as it came: sums of numpy's ``float16``, say, stop growing at 2048.
    """
    # The first test is quick, the second (which `Decimal` does not pass) is not.
    if not isinstance(value, (float, int)) and not isinstance(value, (Real, Decimal)):
        raise TypeError(f"{name} must be a number (int or float), not {_shown(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except ValueError:  # a signalling NaN of Decimal
        return math.nan


def _not_finite(name: str, value: float) -> NoReturn:
    raise ValueError(f"{name} must be a finite number, not {_shown(value)}")


def _shown(value: object) -> str:
    """Return the repr of a wrong value, also where Python refuses it: an int of 5,000 digits."""
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - the error to come is about the value, not about its repr
        return f"this {type(value).__name__}, which is too long to show"
