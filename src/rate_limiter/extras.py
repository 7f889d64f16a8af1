"""Imports of packages that only an extra of this distribution installs."""

import contextlib
import importlib
from collections.abc import Iterator

__all__ = ["extra"]


@contextlib.contextmanager
def extra(name: str, package: str, lowest: tuple[int, int] = (0, 0)) -> Iterator[None]:
    """Import a package of an extra; then run the imports in the ``with`` block. An error names the extra.

    Args:
        name: The extra.
        package: The package. Its ``VERSION``, if it has one, is compared.
        lowest: Its lowest version: pip checks that only for those who have asked for the extra.

    Raises:
        ImportError: A package is missing, or the version is lower.

    """
    remedy = f'pip install "celery-token-bucket[{name}]"'
    try:
        version = getattr(importlib.import_module(package), "VERSION", lowest)
        if version < lowest:
            found, needed = (".".join(map(str, each[:2])) for each in (version, lowest))
            raise ImportError(
                f"{package} {found} is too old, needed is {needed} or newer: {remedy}", name=package
            )
        yield
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(f"{missing}: {remedy}", name=missing.name) from missing
