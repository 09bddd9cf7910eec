"""The errors a person is meant to read."""


class SparsightError(Exception):
    """What was given, what is allowed and what to do, in one line.

    The command line prints it and exits with code 2; nothing has been written by then.
    """


class NotWritten(SparsightError):
    """The disk is full, or a folder cannot be written to; no half-written output is left."""


class Interrupted(BaseException):
    """Work that was stopped by Ctrl-C and can go on: the line says how. No `except Exception` swallows it."""


class Notice(UserWarning):
    """What a user should know and is no error; the command line prints it as one line."""
