"""What every program in launcher/ does around its work: quiet surroundings, and one clear message
on failure."""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol, TypeVar

from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.distributed.launch import this_launch
from sparse_lora_dist.errors import PeerError, Stopped, UserError

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
STOPPED = 75
"""BSD's EX_TEMPFAIL: ended early on purpose and saved; the same command with --resume auto goes
on."""
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
    """A ``Config``, or what another program reads from its command line."""

    @property
    def run(self) -> RunConfig: ...


Read = TypeVar("Read", bound=HasRun)


def run_program(
    argv: Sequence[str], read: Callable[[Sequence[str]], Read], work: Callable[[Read], None]
) -> None:
    """Do ``work`` with what ``read`` makes of ``argv``; leave with 2 and a message on a user's
    mistake, 1 and a traceback on ours."""
    debug = False
    try:
        this_launch()  # first, so that what follows may ask it without another error
        config = read(argv)
        debug = config.run.debug
        if not debug:
            quiet_others()
        work(config)
        # Not by returning: gloo's threads may abort the interpreter's shutdown of a finished run.
        exit_process(0)
    except UserError as error:
        if debug:
            traceback.print_exc()
        write_stderr(f"error: {error}", for_all=error.shared)
        exit_process(USER_ERROR)
    except Stopped:
        exit_process(STOPPED)
    except SystemExit:  # --help and --print_config end so
        raise
    except KeyboardInterrupt:
        exit_process(INTERRUPTED)
    except PeerError as error:
        if debug:
            traceback.print_exc()
        write_stderr(f"\nrank {this_launch().rank} ends: {error}")
        exit_process(FAILURE)
    except BaseException as error:
        if "closed by peer" in str(error) and not debug:
            write_stderr(
                f"rank {this_launch().rank} ends: another rank is gone; its message says why"
            )
        else:
            traceback.print_exc()
        exit_process(FAILURE)


def write_stderr(message: str, *, for_all: bool = False) -> None:
    """On stderr: once a machine what all ranks found together, else from the rank that found it."""
    if not for_all or this_launch().local_rank == 0:
        print(message, file=sys.stderr)
    else:
        time.sleep(1)  # launchers end all ranks when one leaves, and the one that speaks with it


def exit_process(code: int) -> NoReturn:
    """End at once: the interpreter's own shutdown may wait for peers inside a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def quiet_others() -> None:
    """Keep other libraries' notes off the screen; their errors still show."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module="sparse_lora_dist")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    if this_launch().local_rank != 0:  # one bar a machine says how a download goes
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in FOREIGN_LOGGERS:
        logger = logging.getLogger(name)
        # The level reaches the loggers below this one; the filter holds when the library, imported
        # later than this, sets a level of its own.
        logger.setLevel(logging.ERROR)
        logger.addFilter(lambda record: record.levelno >= logging.ERROR)
