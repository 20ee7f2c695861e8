"""Tell a damaged cache of the package ``datasets`` from damaged data of the user."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_lora_dist.errors import UserError, in_words
from sparse_lora_dist.system.machine_errors import chain, in_plain_words


@contextmanager
def from_cache(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Context manager: errors of the body come from files in the cache, such as one that was cut
    short on a full disk.

    Args:
        folder: folder of the cache whose files are read.

    Raises:
        UserError: the body raised an exception. It names the folder, and not the user's data.
            What the user's data or the machine cause, and errors of a disk, are raised unchanged.
    """
    try:
        yield
    except Exception as error:
        of_data = any(isinstance(one, UserError) for one in chain(error))
        of_disk = isinstance(error, OSError) and error.errno is not None
        if of_data or of_disk or in_plain_words(error) is not None:
            raise
        raise UserError(
            f"The cache {Path(folder)} of the package datasets is damaged: {in_words(error)}. It "
            "holds only copies of data, which are made again: remove this folder, while no job "
            "uses it, and start again."
        ) from error
