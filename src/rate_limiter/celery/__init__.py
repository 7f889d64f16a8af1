"""Rate limits for Celery tasks: `throttle` declares them, `Gate` enforces them before the pool."""

from ..extras import extra

with extra("celery", "celery", (5, 5)):
    from . import control, startup
    from .charge import Charge, current_charge
    from .gate import Gate
    from .throttle import throttle

__all__ = ["Charge", "Gate", "current_charge", "throttle"]

startup.connect()
control.connect()
