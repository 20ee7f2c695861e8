"""Name the programs as the user starts them: by file in a clone, by command where it is installed.

Messages name ``launcher/export.py``. In a folder without ``launcher/``, that is the path by which
the running program was started, with the other name. Of a package that is installed it is the
command ``sparse-lora-export``, or for DeepSpeed's launcher the module ``sparse_lora_dist.export``.
"""

import os
import re
import sys
from pathlib import Path
from shlex import quote
from shutil import which

from sparse_lora_dist.system.shipped import SHIPPED

PROGRAMS = ("train", "eval", "edit", "export", "grid", "plan", "report", "show")
"""Names of the programs: of their files in launcher/, commands and modules."""
_FILE = rf"launcher/({'|'.join(PROGRAMS)})\.py\b"
_LAUNCHED = re.compile(rf"(?<!\S)((?:\S*/)?deepspeed(?: --\w+(?: \d+)?)*) {_FILE}")
"""A command of DeepSpeed's launcher, up to the program's file."""
_ALONE = re.compile(rf"(?<![\w./-])(?:((?:[\w.-]*/)*)python )?{_FILE}")
"""A program's file, with the Python before it if there is one."""


def command(name: str) -> str:
    """Return what to type to start the program ``name`` of this Python environment: its relative
    path if the environment is below the working directory, ``name`` alone if the shell finds it,
    otherwise its absolute path."""
    path = Path(sys.executable).with_name(name)
    short = os.path.relpath(path)
    if not short.startswith(".."):
        return quote(short)
    return str(path) if path.exists() and which(name) != str(path) else name


def as_started_here(text: str) -> str:
    """Return a message in which the programs have the names by which they can be started here.

    ``python launcher/export.py RUN`` stays so if the working directory has launcher/train.py. If
    the running program is a file of another launcher/, the message names its neighbour there.
    Otherwise it becomes ``sparse-lora-export RUN`` if that is installed, and the file that comes
    with the package if not.

    Args:
        text: a message for the user, which names files of launcher/.
    """
    if Path("launcher/train.py").is_file():
        return text
    started = Path(sys.argv[0])
    is_file = started.is_file() and started.absolute().parent.name == "launcher"
    if is_file or not Path(sys.executable).with_name("sparse-lora-train").exists():
        folder = started.parent if is_file else (SHIPPED / "launcher").resolve()
        return re.sub(rf"(?<![\w./-]){_FILE}", lambda m: quote(f"{folder}/{m[1]}.py"), text)
    text = _LAUNCHED.sub(r"\1 --module sparse_lora_dist.\2", text)
    return _ALONE.sub(r"\1sparse-lora-\2", text)
