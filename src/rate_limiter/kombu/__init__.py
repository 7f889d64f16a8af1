"""Rate limits for plain kombu consumers: `Gate` holds messages, `GateMixin` puts it into a consumer."""

from .gate import Gate
from .mixin import GateMixin

__all__ = ["Gate", "GateMixin"]
