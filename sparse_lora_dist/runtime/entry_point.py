"""Run a program of launcher/: read its options, silence other libraries, do its work, print one
message on failure, and exit with the status that says what happened."""

import codecs
import errno
import io
import locale
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, Protocol, TypeVar

from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.distributed.launch import this_launch
from sparse_lora_dist.distributed.shared_message import print_once, tell_printed
from sparse_lora_dist.errors import (
    HeldError,
    PeerError,
    Stopped,
    StorageError,
    UserError,
)
from sparse_lora_dist.system.machine_errors import in_plain_words, of_path
from sparse_lora_dist.system.program_names import as_started_here

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
NO_READER = 141
"""Exit status if whoever read stdout has gone, as in ``show.py A | head``: that of SIGPIPE."""
HELD = 73
"""Exit status of a job whose run folder another job writes (EX_CANTCREAT of BSD's sysexits.h)."""
STOPPED = 75
"""Exit status of a run that was asked to stop early (EX_TEMPFAIL of BSD's sysexits.h). Unless it
stopped before its first step, it has saved a checkpoint. The same command with --resume auto
continues the run. A run whose disk is full or away ends with it too: slurm/run.sh requeues it."""
STATUS = {HeldError: HELD, StorageError: STOPPED}
"""Exit statuses of the kinds of ``UserError`` that do not end with USER_ERROR."""
PANIC = "PanicException"
"""Name of the exception, no ``Exception``, of libraries in Rust that meet what they never expected:
of tokenizers a tokenizer.json whose parts contradict each other."""
FOREIGN_LOGGERS = (
    "DeepSpeed",
    "bitsandbytes",
    "datasets",
    "httpx",
    "torch",
    "transformers",
    "huggingface_hub",
)


class HasRun(Protocol):
    """Options of any program of launcher/: an object whose attribute ``run`` is a ``RunConfig``, as
    ``Config`` is."""

    @property
    def run(self) -> RunConfig: ...


Read = TypeVar("Read", bound=HasRun)


def run_program(
    argv: Sequence[str], read: Callable[[Sequence[str]], Read], work: Callable[[Read], None]
) -> None:
    """Read the options of a program, do its work, and end the process. It never returns. Called on
    every rank.

    Exit status: 0 when done; 2 on a ``UserError``, with its message; 73 if another job writes the
    run folder (``HeldError``); 1 on any other error, with a traceback, or with one line if another
    rank caused it; 75 if a run was asked to stop early, or results could not be written because
    storage failed for a while (``StorageError``); 130 on Ctrl-C, unless ``stop_signals`` takes it
    as a request to stop; 141, without a message, if nobody reads stdout any more.

    Args:
        argv: command line without the program's name.
        read: function that turns ``argv`` into the options, or raises ``UserError``.
        work: function that does the work of the program, given the options.
    """
    debug = _asks_for_debug(argv)  # until the options are read
    _escape_letters()
    if (said := wrong_interpreter(sys.flags, locale.getpreferredencoding(False))) is not None:
        write_stderr(f"error: {said}")
        exit_process(USER_ERROR)
    try:
        this_launch()  # first, so that later calls cannot fail while an error is reported
        config = _options(argv, read)
        debug = config.run.debug
        if not debug:
            quiet_others()
        work(config)
    except SystemExit:  # raised by --help and --print_config
        if (status := _flushed()) != 0:  # Python's own shutdown would print a traceback
            exit_process(status)
        raise
    except BaseException as error:
        _finish_message_first()
        exit_process(_report(error, debug=debug))
    # Not by returning: gloo's threads may abort the interpreter's shutdown, after the run has
    # finished.
    exit_process(0)


def wrong_interpreter(flags: Any, encoding: str) -> str | None:
    """Return why the libraries do not run in a Python that was started so; None if they do.

    Args:
        flags: ``sys.flags``.
        encoding: name of the encoding in which Python opens text files.
    """
    if flags.optimize > 1:
        return (
            "transformers reads the docstrings of its code, which python -OO and PYTHONOPTIMIZE=2 "
            "remove. Start without them."
        )
    if codecs.lookup(encoding).name == "ascii":
        return "torch reads files in UTF-8, but Python was told to read ASCII. Set PYTHONUTF8=1."
    return None


def _options(argv: Sequence[str], read: Callable[[Sequence[str]], Read]) -> Read:
    """Return ``read(argv)``. A path in the options that the system lets nobody look at, such as one
    in a folder of another user, is a mistake in the options: Python raises OSError for it."""
    try:
        return read(argv)
    except (OSError, RuntimeError) as error:
        if (said := of_path(error)) is None:
            raise
        raise UserError(said, shared=True) from error


def _escape_letters() -> None:
    """Let stdout and stderr write letters that their encoding lacks as ``\\xe9``, instead of
    raising an error after the work is done. A stream that was closed (``>&-``) leads nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  open to the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flushed(more: str = "") -> int:
    """Flush stdout and stderr. Return 0, or the exit status if stdout cannot be written, after a
    message unless its reader has gone.

    Args:
        more: text to write to stdout first.
    """
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except ValueError:  # it is closed
        return 0
    except OSError as error:
        if error.errno == errno.EPIPE:
            return NO_READER
        with suppress(OSError, ValueError):
            said = "Make room there, or send the output elsewhere."
            write_stderr(f"error: stdout cannot be written: {error.strerror}. {said}")
        return FAILURE
    return 0


def _finish_message_first() -> None:
    """Ignore SIGTERM from here on. Launchers send it to all ranks when one has ended, and this rank
    has a message to print first, and then ends by itself."""
    with suppress(ValueError):  # not in the main thread, as in a user's own program
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _report(error: BaseException, *, debug: bool) -> int:
    """Print the message of an error that ends the program, and return its exit status."""
    may_be_of_stdout = isinstance(error, OSError) and error.filename is None
    # Python may have dropped what print could not write, so only another letter shows it.
    if may_be_of_stdout and (status := _flushed("\n")) != 0:
        return status
    if isinstance(error, Stopped):
        return STOPPED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if debug and isinstance(error, UserError | PeerError):
        traceback.print_exc()
    if isinstance(error, UserError):
        write_stderr(f"error: {error.found_by}{error}", for_all=error.shared)
        return STATUS.get(type(error), USER_ERROR)
    if isinstance(error, PeerError):
        write_stderr(f"\nrank {this_launch().rank} ends: {error}")
        return FAILURE
    if (said := in_plain_words(error) or of_path(error)) is not None:
        if debug:
            traceback.print_exc()
        write_stderr(f"error: {said}")
        return USER_ERROR
    if type(error).__name__ == PANIC and not debug:
        write_stderr(
            f"error: a library cannot use a file of the model: {error}. If the library is "
            "tokenizers, tokenizer.json is damaged: download the model again. --debug shows where."
        )
        return USER_ERROR
    if "closed by peer" in str(error) and not debug:
        write_stderr(f"rank {this_launch().rank} ends because another rank ended. See its message.")
    else:
        traceback.print_exc()
        tell_printed(this_launch())
    return FAILURE


def _asks_for_debug(argv: Sequence[str]) -> bool:
    """Return True if the command line has --debug, so that an error in the options themselves comes
    with its traceback too."""
    words = [*argv, ""]
    off = ("false", "no")
    return "--debug=true" in words or any(
        word == "--debug" and after.lower() not in off
        for word, after in zip(words, words[1:], strict=False)
    )


def write_stderr(message: str, *, for_all: bool = False) -> None:
    """Print ``message`` on stderr.

    Args:
        message: the text to print.
        for_all: True if all ranks call this with the same message. One rank of each machine then
            prints it, and the others wait until it has, for a few seconds at most.
    """
    message = as_started_here(message)
    if for_all:
        print_once(message, this_launch())
    else:
        print(message, file=sys.stderr, flush=True)


def exit_process(code: int) -> NoReturn:
    """End the process at once with exit status ``code``, after flushing stdout and stderr. Python's
    own shutdown (atexit functions, destructors) is skipped, because it may wait for other ranks
    inside a collective. If stdout cannot be written, status 0 becomes another."""
    unwritten = _flushed() if code == 0 else 0
    if code != 0:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
    os._exit(code or unwritten)


def quiet_others() -> None:
    """Silence warnings and log messages of other libraries in this process. Their errors are still
    printed."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module="sparse_lora_dist")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    # One progress bar a machine is enough for downloads, and in a file there is none.
    in_file = not sys.stderr.isatty()
    if in_file or this_launch().local_rank != 0:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if in_file:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in FOREIGN_LOGGERS:
        logger = logging.getLogger(name)
        # The level also applies to child loggers. The filter is for libraries that are imported
        # later and then set a level of their own.
        logger.setLevel(logging.ERROR)
        logger.addFilter(lambda record: record.levelno >= logging.ERROR)
