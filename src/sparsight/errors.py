"""The errors a person is meant to read."""

from typing import Any

QUOTED, LINE = 80, 200  # characters


class SparsightError(Exception):
    """What was given, what is allowed and what to do, in one line.

    The command line prints it and exits with code 2; no output has been written by then. An error in the midst of long work
    says in its `advice` how to go on, which a caller that has other commands replaces.
    """

    work: Any = None  # the folder with what was done, if anything was
    advice: str = ""
    retry: bool = False  # whether the same work can succeed when it goes on

    def __str__(self) -> str:
        return "; ".join(part for part in (super().__str__(), self.advice) if part)


class NotWritten(SparsightError):
    """The disk is full, or a folder cannot be written to; no half-written output is left."""

    retry = True


class OutOfMemory(SparsightError):
    """Memory has run out; `retry` says whether the work can go on with the settings that the line names."""


class Interrupted(BaseException):
    """Work that was stopped by Ctrl-C or SIGTERM and can go on: the line says how. No `except Exception` swallows it."""


class Notice(UserWarning):
    """What a user should know and is no error; the command line prints it as one line."""


def quote(value: Any) -> str:
    """A value of the user's for a message: its `repr`, of which at most 80 characters are shown."""
    if isinstance(value, str | bytes):
        value = value[: QUOTED + 1]  # the repr of a long text is as long
    text = repr(value)
    return text if len(text) <= QUOTED else text[: QUOTED - 4] + "..." + text[0] * (text[0] in "'\"")


def first_line(error: BaseException) -> str:
    """The first line of another library's error, at most 200 characters of it; the class of one that says nothing."""
    said = error.strerror if isinstance(error, OSError) and error.filename else str(error)  # without the path
    text = (str(said).strip().splitlines() or [type(error).__name__])[0]
    return text if len(text) <= LINE else text[: LINE - 3] + "..."
