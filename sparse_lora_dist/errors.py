"""Exceptions that end a run without a fault of the program: user errors, stop requests, lost
peers."""


class UserError(Exception):
    """A mistake in what the user gave: options, files, the environment.

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


class ConfigError(UserError):
    """The configuration of a run is invalid. Always shared by all ranks.

    Args:
        problems: one sentence for each problem; all that were found, not only the first.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"the configuration has {count}:\n" + "\n".join(f"  - {p}" for p in problems),
            shared=True,
        )


class Stopped(Exception):
    """A request to save a checkpoint and exit; the message gives the reason. Raised on all ranks
    together."""


class PeerError(Exception):
    """This rank ends because another rank is gone or stuck; the message names that rank if it is
    known.

    Neither a user error nor a failure of the rank that raises it.
    """
