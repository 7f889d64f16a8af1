"""Rate limits for plain kombu consumers: `Gate` holds messages, `GateMixin` puts it into a consumer."""

from ..extras import extra

with extra("kombu", "kombu", (5, 5)):
    from .gate import Gate
    from .mixin import GateMixin

__all__ = ["Gate", "GateMixin"]
