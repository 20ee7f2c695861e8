"""What ends a run that is no fault of ours: a user's mistake, said so that it can be mended, and a
wish to stop."""


class UserError(Exception):
    """One mistake in what the user gave us: what we got, what is allowed, what to change.

    The launcher prints the message alone; ``--debug`` adds the traceback.
    """

    shared = False
    """Do all ranks raise it together? Then one of them says it for all."""

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class ConfigError(UserError):
    """The run description is wrong; carries every problem found, not just the first."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"the configuration has {count}:\n" + "\n".join(f"  - {p}" for p in problems),
            shared=True,
        )


class Stopped(Exception):
    """The run is to be saved and left. All ranks raise it together; its text says why."""


class PeerError(Exception):
    """This rank ends because another is gone or stuck; the message says which, where that is known.

    Not the user's mistake, and not a failure of the rank that raises it.
    """
