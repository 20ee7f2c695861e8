"""Exceptions that end a run without a bug: user errors, requests to stop, lost ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

MOST_LETTERS = 500
"""Longest text of another library's exception that a message quotes."""

MOST_PROBLEMS = 50
"""Largest number of problems that a ``ConfigError`` prints."""


class UserError(Exception):
    """Raised for a mistake in what the user gave: options, files or environment variables.

    The message says what was found, what is allowed and what to do next. The programs print it
    without a traceback; ``--debug`` adds the traceback.

    Args:
        message: the text to print.
        shared: True if all ranks raise the same error, so that one rank of each machine prints it.
    """

    shared = False
    """True if all ranks raise the same error, so that one rank of each machine prints it."""
    found_by = ""
    """Beginning of the printed message if some ranks failed and rank 0 did not: which rank failed,
    in what. Otherwise empty."""

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class StorageError(UserError):
    """Raised if storage failed in a way that may pass, such as a full disk or a file server that is
    away. The program ends with the status of a run that was asked to stop, so that a batch system
    starts it again."""


class HeldError(UserError):
    """Raised if another job that is alive writes the run folder. The program ends with a status of
    its own: nothing that the user gave is wrong, and the run may be started when that job ends."""


class ConfigError(UserError):
    """Raised if the configuration of a run is invalid, always by all ranks (``shared`` is True).

    Args:
        problems: all problems that were found, one sentence for each.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        more = len(problems) - MOST_PROBLEMS
        shown = problems[:MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        super().__init__(
            f"the configuration has {count}:\n" + "\n".join(f"  - {p}" for p in shown),
            shared=True,
        )


class Stopped(Exception):
    """Raised on all ranks together to save a checkpoint and exit. The message gives the reason."""


class Finished(Exception):
    """Raised on all ranks if a run is started again that has made all its steps already."""


class PeerError(Exception):
    """Raised to end this rank because another rank has ended or makes no progress.

    The message names the other rank if it is known. The rank that raises it did not fail itself.
    """


def in_words(error: BaseException) -> str:
    """Return an exception of another library for a message: its type, and its text on one line.

    Args:
        error: the exception. Of a long text the beginning is returned.
    """
    if isinstance(error, RecursionError):
        return "RecursionError: it is nested too deep"
    text = " ".join(str(error).split())
    text = text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def as_user_error(source: str, advice: str) -> Iterator[None]:
    """Context manager that turns any exception of the body into a ``UserError``.

    The one place for what other libraries raise while they read, open or tokenise what the user
    gave. They raise a dozen types, from KeyError to their own. The traceback is printed with
    ``--debug``. The body must make no collective.

    Args:
        source: what is being read: an option with its value, or a file. The message begins with it.
        advice: what to do, in a sentence.

    Raises:
        UserError: the body raised an exception. Exceptions of this file, and errors of a disk or
            network (an ``OSError`` with an errno), are raised unchanged.
    """
    try:
        yield
    except (UserError, Stopped, PeerError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{source} cannot be used: {in_words(error)}. {advice}") from error
