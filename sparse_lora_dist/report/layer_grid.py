"""Arranges the linears that carry adapters (sites) in a grid by their names, with a row per layer
and a column per kind of module, such as "q_proj"."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUMBERED = re.compile(r"(?P<before>.*?)\.(?P<layer>\d+)\.(?P<module>.+)")
"""Pattern of a site's name that has a layer number: the first number between dots, as in
"model.layers.3.mlp.up_proj"."""
Grid = NDArray[np.float64]
"""One value per cell of a grid: float64 [number of layers, number of modules]."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Grid of sites: its rows, its columns, and the position of every site."""

    layers: list[int]
    """Layer number of each row, ascending."""
    modules: list[str]
    """Name of each column: the shortest ending of the module's name that no other column has, such
    as "q_proj", or "encoder.query" beside "decoder.query"."""
    places: Mapping[str, tuple[int, int]]
    """Name of a site -> (row, column)."""

    def grid(self, values: Mapping[str, float]) -> Grid:
        """Arrange values of sites in an array.

        Args:
            values: name of a site -> its value. Sites may be left out.

        Returns:
            float64 [number of layers, number of modules], NaN where no site or no value is.
        """
        grid = np.full((len(self.layers), len(self.modules)), np.nan)
        for site, value in values.items():
            grid[self.places[site]] = value
        return grid


def layout_of(sites: Iterable[str]) -> Layout:
    """Return the grid of ``sites``, which are names of modules.

    Example: "model.layers.3.self_attn.q_proj" is in the row of layer 3 and the column "q_proj".
    Columns keep the order of ``sites``. A name without a layer number counts as layer 0.
    """
    split = {site: _split(site) for site in sites}
    kinds = list(dict.fromkeys(kind for _, kind in split.values()))
    layers = sorted({layer for layer, _ in split.values()})
    rows, columns = ({name: i for i, name in enumerate(names)} for names in (layers, kinds))
    places = {site: (rows[layer], columns[kind]) for site, (layer, kind) in split.items()}
    return Layout(layers=layers, modules=_short(kinds), places=places)


def _split(site: str) -> tuple[int, str]:
    """Return the layer number of a site, and its name without that number."""
    match = NUMBERED.fullmatch(site)
    return (0, site) if match is None else (int(match["layer"]), f"{match[1]}.{match['module']}")


def _short(kinds: list[str]) -> list[str]:
    """Return for each name its shortest ending that no other name has: "a.query", "b.query" and
    "b.out" give "a.query", "b.query" and "out"."""
    endings = [_endings(kind) for kind in kinds]
    seen = Counter(ending for own in endings for ending in own)
    return [next((e for e in own if seen[e] == 1), own[-1]) for own in endings]


def _endings(kind: str) -> list[str]:
    """Return all endings of a dotted name, shortest first: "a.b" gives "b" and "a.b"."""
    words = kind.split(".")
    return [".".join(words[i:]) for i in reversed(range(len(words)))]
