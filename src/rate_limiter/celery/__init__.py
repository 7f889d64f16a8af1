"""Rate limits for Celery tasks: `throttle` declares them, `Gate` enforces them before the pool."""

from .charge import Charge, current_charge
from .gate import Gate
from .startup import connect
from .throttle import throttle

__all__ = ["Charge", "Gate", "current_charge", "throttle"]

connect()
