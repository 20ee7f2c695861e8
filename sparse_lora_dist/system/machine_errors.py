"""Words for errors that the machine causes, in whatever library they come up: a cache that cannot
be written, and memory that a limit refuses."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT),
    *(errno.ENOTDIR, errno.ENOENT, errno.EEXIST),  # EEXIST: a file is in its place
)
"""Errors of a folder that cannot be made or written."""
NO_MEMORY = re.compile(
    r"cannot allocate memory|can't allocate memory|can't start new thread|std::bad_alloc"
    r"|failed to map segment|unable to allocate|not enough memory",
    re.IGNORECASE,
)
"""Texts of libraries that get no more memory from the system."""
NOT_SAME_BITS = "does not have a deterministic implementation"
GPU_WORDS = 400
"""Letters of torch's text about a full GPU: what was asked for, allocated and free."""
NO_TEMPORARY = "No usable temporary directory"
"""Text of Python's tempfile if no folder for temporary files can be written."""
REFUSED = (errno.EACCES, errno.EPERM)
"""Errors of a file or folder that this user may not read or enter."""
AWAY = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.EREMOTEIO)
"""Errors of a disk or file server that does not answer."""
QUOTED_PATH = re.compile(r"['\"](/[^'\"]+)['\"]")


def in_plain_words(error: BaseException) -> str | None:
    """Return what to do about an error that the machine causes; None for any other error.

    Args:
        error: the exception, with those that it comes from.
    """
    for one in chain(error):
        if (said := _of_cache(one, os.environ)) is not None:
            return said
        if type(one).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            return (
                f"the memory of the GPU is full. {_short(one, GPU_WORDS)} Use "
                "--gradient_checkpointing true, a smaller --micro_batch_size or --sequence_length, "
                "--ds_config zero3_offload or more ranks: the plan in the line 'memory' lists what "
                "each saves. See with nvidia-smi whether another program uses the GPU."
            )
        if NOT_SAME_BITS in str(one):  # torch's, under --deterministic
            return (
                f"--deterministic true: on a GPU the model needs {str(one).split()[0]}, which "
                "torch has only with sums in any order. Leave --deterministic out: ranks still "
                "agree on every bit, but another run may differ from this one by rounding."
            )
        if _is_of_memory(one):
            return (
                f"this process gets no more memory ({_short(one)}). Raise the limit (ulimit -v, or "
                "sbatch --mem), or use smaller options: launcher/plan.py says what a run needs."
            )
    return None


def of_path(error: BaseException) -> str | None:
    """Return what to do about a path that the system does not let this process look at: a folder
    of another user, a disk that is away, links that lead in a circle, a current folder that was
    removed. None for any other error.

    Args:
        error: the exception, as Python's functions on paths raise it.
    """
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from "):
        path = str(error).removeprefix("Symlink loop from ")  # text of Path.resolve
        return f"{path} is a symbolic link that leads back to itself. Correct or remove the link."
    if not isinstance(error, OSError):
        return None
    if isinstance(error, FileNotFoundError) and error.filename is None and not _has_folder():
        return "The current folder was removed. Change to a folder that exists, and start again."
    if error.filename is None or error.errno is None:
        return None
    found = f"{_shown(error.filename)} cannot be used: {os.strerror(error.errno)}."
    if error.errno in REFUSED:
        return (
            f"{found} Ask its owner for access, or name another path. `namei -l PATH` shows who "
            "may enter each folder of a path."
        )
    if error.errno in AWAY:
        return f"{found} Its disk or file server does not answer. Start again once it does."
    if error.errno == errno.ELOOP:
        return f"{found} A symbolic link in it leads back to itself. Correct or remove the link."
    return None


def _has_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _shown(name: object) -> str:
    text = os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
    return text if text.isprintable() else ascii(text)


def caches(environ: Mapping[str, str]) -> dict[str, Path]:
    """Return the folders in which libraries keep what they download or compile.

    Args:
        environ: the environment variables of the process.

    Returns:
        {variable that sets the folder: the folder}. Several folders may have one variable's.
    """
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    hugging_face = Path(environ.get("HF_HOME") or cache / "huggingface")
    usual = {
        "HF_DATASETS_CACHE": hugging_face / "datasets",
        "HF_HUB_CACHE": hugging_face / "hub",
        "HF_HOME": hugging_face,
        "TRITON_CACHE_DIR": Path(environ.get("TRITON_HOME") or home) / ".triton",
        "TORCH_EXTENSIONS_DIR": cache / "torch_extensions",
        "MPLCONFIGDIR": Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "matplotlib",
    }
    found = {name: environ.get(name) or folder for name, folder in usual.items()}
    return {name: Path(os.path.abspath(folder)) for name, folder in found.items()}


def _of_cache(error: BaseException, environ: Mapping[str, str]) -> str | None:
    if NO_TEMPORARY in str(error):
        return (
            "No folder for temporary files can be written. Set TMPDIR to a folder that this job "
            "can write to."
        )
    if not isinstance(error, OSError) or error.errno not in UNWRITABLE:
        return None
    for path in _paths(error):
        for name, folder in caches(environ).items():
            inside = path.is_relative_to(folder) and error.errno != errno.ENOENT
            # Of a folder that cannot be made, the error names the first missing parent.
            if inside or (folder.is_relative_to(path) and not _writes(path)):
                variable = "HF_HOME" if name.startswith("HF_") else name
                only = f" ({name} for this cache alone)" if variable != name else ""
                return (
                    f"The cache {folder} cannot be used: {os.strerror(error.errno)}: {path}. "
                    f"Set {variable}{only} to a folder that this job can write to, such as one on "
                    "a scratch disk."
                )
    return None


def _writes(path: Path) -> bool:
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def _paths(error: OSError) -> Iterator[Path]:
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
    for name in [*names, *QUOTED_PATH.findall(str(error))]:
        yield Path(os.path.abspath(name))


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    kinds = (RuntimeError, ImportError, OSError)  # torch, gloo and the loader of libraries
    return isinstance(error, kinds) and NO_MEMORY.search(str(error)) is not None


def _short(error: BaseException, most: int = 200) -> str:
    text = " ".join(str(error).split())[:most]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it comes from, the first of them last."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__
