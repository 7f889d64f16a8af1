"""Finding an argument of a job by its name."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

__all__ = ["Parameters", "field_of_body"]

_NONE: Final = inspect.Parameter.empty
_NAMED: Final = inspect.Parameter.POSITIONAL_OR_KEYWORD
_FIRST: Final = inspect.Parameter.POSITIONAL_ONLY
_KEYWORD: Final = inspect.Parameter.KEYWORD_ONLY


class Parameters:
    """The parameters of a task's function: where a job has the argument of a name.

    Args:
        function: The function, or its signature. Of one that has no signature (some builtins) every
            argument counts as sent by keyword.

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
        #: Whether it takes keyword arguments of any name.
        self.any_keyword = False
        #: By name: the position, whether a keyword does too, and the default.
        self._places: dict[str, tuple[int, bool, Any]] = {}
        for place, each in enumerate(self._signature.parameters.values()):
            if each.kind is each.VAR_KEYWORD:
                self.any_keyword = True
            elif each.kind is not each.VAR_POSITIONAL:
                position = sys.maxsize if each.kind is _KEYWORD else place
                self._places[each.name] = (position, each.kind is not _FIRST, each.default)

    @property
    def names(self) -> list[str]:
        """The names of the parameters, without ``*args`` and ``**kwargs``."""
        return list(self._places)

    @functools.cached_property
    def without_first(self) -> "Parameters":
        """The same without the first one, which is ``self`` in a bound task."""
        every = list(self._signature.parameters.values())
        if not every or every[0].kind not in (_NAMED, _FIRST):  # it is in *args
            return self
        return Parameters(self._signature.replace(parameters=every[1:]))

    def argument(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return a job's argument: as it was sent, by position or by keyword, or else its default.

        Args:
            name: The name of the parameter.
            args: The positional arguments that the producer sent.
            kwargs: The keyword arguments that the producer sent.

        Raises:
            LookupError: The job has no such argument.

        """
        position, by_keyword, default = self._places.get(name, (sys.maxsize, True, _NONE))
        if position < len(args):
            return args[position]
        if by_keyword and name in kwargs:
            return kwargs[name]
        if default is _NONE:
            raise LookupError("the job has no such argument")
        return default


def field_of_body(name: str, body: Any) -> Any:
    """Return a field of a message's body, which is to be a mapping.

    Raises:
        LookupError: It is not, or has no such field.

    """
    if not isinstance(body, Mapping):
        raise LookupError("the body is not a mapping")
    if name not in body:
        raise LookupError("the body has no such field")
    return body[name]
