"""From the names of fields, as the library writes them, to the options of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAME = re.compile(r"`([a-z][a-z_]*(?:\.[a-z_]+)?)(?:=([^`]*))?`")
_fields: set[str] = set()


def add_fields(names: Iterable[str]) -> None:
    """Note names that are options of some command."""
    _fields.update(names)


def flag(name: str) -> str:
    """The option of a field: `--batch-size` of `batch_size`."""
    return f"--{name.replace('_', '-')}"


def with_flags(text: str) -> str:
    """Write `--field value` for every `field=value` in backticks that is an option; keys of recipes lose their backticks."""

    def write(match: re.Match) -> str:
        name, value = match[1], match[2]
        if "." in name:
            return name + (f"={value}" if value is not None else "")
        if name not in _fields:
            return match[0]
        return flag(name) + (f" {value}" if value is not None else "")

    return _NAME.sub(write, text)
