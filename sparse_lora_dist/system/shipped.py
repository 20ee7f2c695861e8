"""Files that come with the package, and the names by which options take them.

``--ds_config zero3`` and ``--config demo`` are names. Each is the file of that name in the folder
``ds_configs/`` or ``configs/`` of the working directory, or without one the file that comes with
the package. So the same command works in a clone, where these are files to edit, and from any
working directory where the package is installed.
"""

import re
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "shipped"
"""Folder with links to folders of the repository; in an installed package, with copies of them."""
ASSETS = (SHIPPED / "assets").resolve()
"""Folder with the model and the data that come with the package."""
NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of file that an option takes by name."""

    option: str
    """Name of the option."""
    folder: str
    """Name of the folder of these files, in the working directory and in the package."""
    suffix: str
    """End of the files' names."""

    def names(self) -> list[str]:
        """Return the names of the files that come with the package."""
        return sorted(path.stem for path in (SHIPPED / self.folder).glob(f"*{self.suffix}"))

    def find(self, value: str) -> str:
        """Return the path of the file that a value of the option stands for.

        Args:
            value: a path, or a name.

        Returns:
            ``value`` itself, unless it is a name of a file that exists. A folder of that name, such
            as a run's, is passed over.
        """
        if NAME.fullmatch(value) is None or Path(value).is_file():
            return value
        file = f"{value}{self.suffix}"
        places = (Path(self.folder, file), (SHIPPED / self.folder).resolve() / file)
        # A broken link, a pipe or a folder of that name too: it is meant, and cannot be read.
        return next((str(place) for place in places if lexists(place)), value)

    def notes(self, value: str) -> list[str]:
        """Return a sentence for the user if a name stands for a file of the working directory that
        differs from the file of this name that comes with the package; otherwise nothing."""
        shipped, found = SHIPPED / self.folder / f"{value}{self.suffix}", Path(self.find(value))
        named = str(found) != value and shipped.is_file()
        if not named or found.read_bytes() == shipped.read_bytes():
            return []
        return [f"--{self.option} {value} is {found}, not the file that comes with the package"]

    def allowed(self) -> str:
        """Return what the option takes, for the message about a file that does not exist."""
        return f"Name a file, or one that comes with the package: {', '.join(self.names())}"


ENGINE = Kind(option="ds_config", folder="ds_configs", suffix=".json")
CONFIG = Kind(option="config", folder="configs", suffix=".yaml")
