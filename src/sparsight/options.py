"""Fields of settings with help and checks, and the base class that checks them.

Options of the command line, keys of a recipe, axes of a sweep, inputs of the estimate and keywords in Python are made from
the fields of `specs.py`. Tables are named as "module:TABLE" and read when a name is looked up or help is printed.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from sparsight.checks import check_name, check_trackers, current_name, nearest, parse_list, plain_value
from sparsight.errors import SparsightError, quote

Budget = str | float | Mapping[str, float]
Ranks = int | str | Mapping[str, int]


if TYPE_CHECKING:
    Name = Any
else:

    class Name:
        """The type of a field that takes a name in a table, an entry of the table, or a function."""


class Argument(str):
    """The help of a verb's parameter that is positional on the command line; `required` there, if not in Python."""

    required: bool

    def __new__(cls, text: str, required: bool = False) -> Self:
        """Make the help of `text`."""
        argument = super().__new__(cls, text)
        argument.required = required
        return argument


@dataclass(frozen=True)
class Option:
    """The help and the check of a field.

    `help` may hold `{names}`, the names in `tables`; only these, and functions, are then allowed. A table is a tuple of
    words or "module:TABLE". `fits` tests a value and `says` completes "VALUE is not ...". `cost`: True, the estimate
    reads the field; False, the field changes the cost and is not counted. `work`: whether it changes what a verb writes;
    None, if it does where it is set.
    """

    help: str
    tables: tuple[str | tuple[str, ...], ...] = ()
    fits: Callable[[Any], bool] = lambda value: True
    says: str = ""
    cost: bool | None = None
    work: bool | None = True

    def names(self) -> tuple[str, ...]:
        """The names that are allowed; empty where there is no table."""
        return tuple(name for table in self.tables for name in (table if isinstance(table, tuple) else _read_table(table)))

    def text(self) -> str:
        """The help with the names filled in."""
        return self.help.replace("{names}", ", ".join(self.names()))


def _at_least_one(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def count(help: str, **more: Any) -> Option:
    """The option of a whole number of at least 1."""
    return Option(help, fits=_at_least_one, says="a whole number of at least 1", **more)


def above_zero(help: str, **more: Any) -> Option:
    """The option of a number above 0."""
    return Option(help, fits=lambda value: math.isfinite(value) and value > 0, says="a number above 0", **more)


def at_least_zero(help: str, noun: str, **more: Any) -> Option:
    """The option of a number of at least 0."""
    return Option(help, fits=lambda value: 0 <= value < math.inf, says=f"a {noun} of at least 0", **more)


def below_one(help: str, says: str, **more: Any) -> Option:
    """The option of a number from 0 to below 1."""
    return Option(help, fits=lambda value: 0 <= value < 1, says=says, **more)


def epochs(help: str) -> Option:
    """The option of a number of epochs, 0 or more."""
    says = "a number of epochs, 0 or more"
    return Option(help, fits=lambda value: isinstance(value, int) and value >= 0, says=says, cost=False)


def _read_table(where: str) -> tuple[str, ...]:
    table = read_table(where)
    return tuple(table() if callable(table) else table)


def read_table(where: str) -> Any:
    """The table that "module:TABLE" names."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The base of all records of settings: a record holds valid values.

    **Raises** `SparsightError`, naming the field in backticks, for a value that a field does not take.
    """

    verb: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_trackers("report_to", getattr(self, "report_to", ()))  # before the tables of names, which import much
        for name, (kind, option) in options(type(self)).items():
            object.__setattr__(self, name, _checked(name, kind, option, getattr(self, name)))

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str = "") -> Self:
        """Make a record of a mapping; errors name the field as `where.field`.

        **Raises** `SparsightError` for a key that is no field, and for a value that a field does not take.
        """
        names = tuple(options(cls))
        for key in settings:
            if key not in names:
                raise SparsightError(f"{where or cls.verb}: unknown key {key!r}; {nearest(str(key), names)}")
        try:
            return cls(**settings)
        except SparsightError as error:
            raise SparsightError(re.sub(r"^`(\w+)`", rf"`{where}.\1`", str(error)) if where else str(error)) from error

    @classmethod
    def make(cls, spec: Spec | Mapping[str, Any] | None, settings: Mapping[str, Any]) -> Self:
        """The record of a verb: `spec`, or the fields that it shares with this verb, with `settings` in place of its own.

        **Raises** `SparsightError` for what is no record, and as `of` does.
        """
        if spec is None or isinstance(spec, Mapping):
            return cls.of({**(spec or {}), **settings})
        if not isinstance(spec, Spec):
            raise SparsightError(
                f"`spec`: {type(spec).__name__} is no record of settings; name fields, as in `sparsity=0.5`"
            )
        own = {"split"} if type(spec) is not cls else set()  # of the data of one verb
        shared = {name: getattr(spec, name) for name in options(cls) if hasattr(spec, name) and name not in own}
        return spec if type(spec) is cls and not settings else cls.of({**shared, **settings})

    def facts(self) -> dict[str, Any]:
        """The fields that change what a verb writes, as values that YAML and JSON can hold."""
        fields = {name: (getattr(self, name), option.work) for name, (_, option) in options(type(self)).items()}
        return {
            name: plain_value(value)
            for name, (value, work) in fields.items()
            if work or (work is None and value is not None)
        }


def options(spec: Any) -> dict[str, tuple[Any, Option]]:
    """The type and the `Option` of every field by name, a class's own fields before those of its bases."""
    return _options(spec)


@cache
def _options(spec: Any) -> dict[str, tuple[Any, Option]]:
    hints = get_type_hints(spec, include_extras=True)
    names = (name for kind in spec.__mro__ for name in vars(kind).get("__annotations__", {}))
    return {name: get_args(hints[name])[:2] for name in dict.fromkeys(names) if get_origin(hints[name]) is Annotated}


def values(spec: Spec) -> dict[str, Any]:
    """The value of every field by name."""
    return {name: getattr(spec, name) for name in options(type(spec))}


def types_of(kind: Any) -> tuple[tuple[Any, ...], bool]:
    """The types that a field takes, and whether None is one of them."""
    kinds = get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)
    return tuple(x for x in kinds if x is not type(None)), type(None) in kinds


def _checked(name: str, kind: Any, option: Option, value: Any) -> Any:
    """The value in the form that a field holds; `SparsightError` if the field does not take it."""
    if hasattr(value, "item") and not callable(value):  # a number of numpy or torch
        value = value.item()
    kinds, optional = types_of(kind)
    if (value is None and optional) or kinds == (Any,):
        return value
    if get_origin(kinds[0]) is tuple:
        return _words(name, kinds[0], option, value)
    if kinds == (bool,) and not isinstance(value, bool):
        raise SparsightError(f"`{name}`: {quote(value)} is neither true nor false")
    if kinds in ((int,), (float,)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kinds == (int,) and not (number and isinstance(value, int) and option.fits(value)):
            raise SparsightError(f"`{name}`: {quote(value)} is not {option.says}")
        if not number or not option.fits(value):
            raise SparsightError(
                f"`{name}`: " + (f"{value:g} is not {option.says}" if number else f"{quote(value)} is not a number")
            )
    if kinds in ((str,), (Name,)):
        value = current_name(name, value)
        if isinstance(value, list | tuple | int | float | None) or (kinds == (str,) and not isinstance(value, str)):
            raise SparsightError(f"`{name}`: {quote(value)} is not a word")
        if isinstance(value, str) and option.tables:
            check_name(name, value, option.names())
    return value


def _words(name: str, kind: Any, option: Option, value: Any) -> tuple[Any, ...]:
    """A list of words, or of words and functions where the field takes them."""
    functions = get_args(kind)[0] is Name
    words = parse_list(value or ()) if isinstance(value, str | list | tuple | None) else (value,)
    if not all(isinstance(word, str) or (functions and callable(word)) for word in words):
        raise SparsightError(f"`{name}`: {quote(value)} is not a list of words")
    for word in words:
        if isinstance(word, str) and option.tables:
            check_name(name, word, option.names())
    return words
