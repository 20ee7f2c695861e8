"""Exceptions that end a run without a bug: user errors, requests to stop, lost ranks."""


class UserError(Exception):
    """Raised for a mistake in what the user gave: options, files or environment variables.

    The message says what was found, what is allowed and what to do next. The programs print it
    without a traceback; ``--debug`` adds the traceback.

    Args:
        message: the text to print.
        shared: True if all ranks raise the same error, so that only rank 0 prints it.
    """

    shared = False
    """True if all ranks raise the same error, so that only rank 0 prints it."""

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class StorageError(UserError):
    """Raised if storage failed in a way that may pass, such as a full disk or a file server that is
    away. The program ends with the status of a run that was asked to stop, so that a batch system
    starts it again."""


class ConfigError(UserError):
    """Raised if the configuration of a run is invalid, always by all ranks (``shared`` is True).

    Args:
        problems: all problems that were found, one sentence for each.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"the configuration has {count}:\n" + "\n".join(f"  - {p}" for p in problems),
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
