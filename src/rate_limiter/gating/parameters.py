"""Finding an argument of a job by its name."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

__all__ = ["Parameters", "field_of_body"]

_NO_DEFAULT: Final = inspect.Parameter.empty
_ANY_WAY: Final = inspect.Parameter.POSITIONAL_OR_KEYWORD
_POSITION_ONLY: Final = inspect.Parameter.POSITIONAL_ONLY
_KEYWORD_ONLY: Final = inspect.Parameter.KEYWORD_ONLY


class Parameters:
    """The parameters of a task's function. They find the argument of a job by the name of its parameter.

    Args:
        function: The function, or its signature. A function without a signature (some builtins) counts as
            one that takes any keyword argument.

    """

    def __init__(self, function: Callable[..., Any] | inspect.Signature) -> None:
        try:
            self._signature = (
                function if isinstance(function, inspect.Signature) else inspect.signature(function)
            )
        except (TypeError, ValueError):
            self._signature = inspect.Signature(
                [inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)]
            )
        #: Whether the function has ``**kwargs``.
        self.any_keyword = False
        #: For each name: its position (`sys.maxsize`: none), whether a keyword may be sent, and its default.
        self._by_name: dict[str, tuple[int, bool, Any]] = {}
        for index, each in enumerate(self._signature.parameters.values()):
            if each.kind is each.VAR_KEYWORD:
                self.any_keyword = True
            elif each.kind is not each.VAR_POSITIONAL:
                position = sys.maxsize if each.kind is _KEYWORD_ONLY else index
                self._by_name[each.name] = (position, each.kind is not _POSITION_ONLY, each.default)

    @property
    def names(self) -> list[str]:
        """The names of the parameters, without ``*args`` and ``**kwargs``."""
        return list(self._by_name)

    @functools.cached_property
    def without_first(self) -> "Parameters":
        """The same parameters without the first one, which is ``self`` in a bound task."""
        every = list(self._signature.parameters.values())
        if not every or every[0].kind not in (_ANY_WAY, _POSITION_ONLY):  # self is in *args
            return self
        return Parameters(self._signature.replace(parameters=every[1:]))

    def argument(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return an argument of a job: as it was sent, by position or by keyword, or else its default.

        Args:
            name: The name of the parameter.
            args: The positional arguments that the producer sent.
            kwargs: The keyword arguments that the producer sent.

        Raises:
            LookupError: The job has no such argument.

        """
        position, by_keyword, default = self._by_name.get(name, (sys.maxsize, True, _NO_DEFAULT))
        if position < len(args):
            return args[position]
        if by_keyword and name in kwargs:
            return kwargs[name]
        if default is _NO_DEFAULT:
            raise LookupError("the job has no such argument")
        return default


def field_of_body(name: str, body: Any) -> Any:
    """Return a field of a message's body.

    Raises:
        LookupError: The body is not a mapping, or has no such field.

    """
    if not isinstance(body, Mapping):
        raise LookupError("the body is not a mapping")
    if name not in body:
        raise LookupError("the body has no such field")
    return body[name]
