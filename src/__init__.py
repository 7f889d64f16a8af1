"""Makes ``src.rate_limiter`` the same modules as ``rate_limiter``. Not part of the wheel.

From a checkout the package can be imported as ``src.rate_limiter`` without installing anything.
If it were loaded a second time under that name, each class would exist twice, and ``except
RateLimitExceeded`` would not catch the other one. So it is loaded as ``rate_limiter`` only, and each
of its modules gets its second name here.
"""

import importlib
import pkgutil
import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
sys.path.insert(0, str(_here))

import rate_limiter  # noqa: E402

if Path(rate_limiter.__file__).resolve().parent != _here / "rate_limiter":
    raise ImportError(
        f"src.rate_limiter stands for the checkout at {_here}, but rate_limiter was already imported "
        f"from {rate_limiter.__file__}: uninstall that copy, or import rate_limiter instead"
    )

sys.modules["src.rate_limiter"] = rate_limiter
for _module in pkgutil.walk_packages(rate_limiter.__path__, "rate_limiter."):
    if _module.name.endswith("__main__"):
        continue
    try:
        sys.modules[f"src.{_module.name}"] = importlib.import_module(_module.name)
    except ImportError as missing:
        if (missing.name or "").startswith("rate_limiter"):
            raise
        # An optional dependency is missing or too old. Importing that module raises this error again.
