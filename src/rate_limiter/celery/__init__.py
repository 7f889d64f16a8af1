"""Rate limits for Celery tasks: `throttle` declares them, `Gate` enforces them before the pool."""

from .gate import Gate
from .throttle import throttle

__all__ = ["Gate", "throttle"]
