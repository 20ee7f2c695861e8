"""Write safetensors files with the permissions of the umask.

safetensors writes into a temporary file that its owner alone may read, and renames it. A colleague
could then read all files of an adapter but its weights.
"""

import errno
import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors import torch as safetensors
from torch import Tensor

from sparse_lora_dist.system.atomic_files import NOT_OFFERED, create


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    """Write tensors into a new safetensors file.

    Args:
        tensors: name -> tensor, contiguous and on the CPU or a GPU.
        path: the file, which must not exist yet.
        metadata: further text to store in the file, by name; PEFT and transformers want
            {"format": "pt"}.

    Raises:
        FileExistsError: there is a file, folder or link of this name.
        OSError: writing failed.
        SafetensorError: writing failed.
    """
    create(path, b"")  # the kernel gives it the mode of the umask, or of the folder's default ACL
    mode = stat.S_IMODE(path.stat().st_mode)
    safetensors.save_file(dict(tensors), path, metadata=metadata)
    if stat.S_IMODE(path.stat().st_mode) != mode:
        _set_mode(path, mode)


def _set_mode(path: Path, mode: int) -> None:
    """Set the mode of a file, unless its file system has no modes of its own, as exFAT and CIFS."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, *NOT_OFFERED):
            raise
