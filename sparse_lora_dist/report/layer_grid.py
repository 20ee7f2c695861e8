"""Arrange sites in a grid by their names: one row per layer, one column per kind of module."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUMBERED = re.compile(r"(?P<before>.*?)\.(?P<layer>\d+)\.(?P<module>.+)")
Grid = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Position of every site in the grid."""

    layers: list[int]
    """Layer numbers, one per row."""
    modules: list[str]
    """Names of the columns, as short as is unique: q_proj, but encoder.query and decoder.query."""
    places: Mapping[str, tuple[int, int]]
    """Site -> row and column."""

    def grid(self, values: Mapping[str, float]) -> Grid:
        """Put a value per site into a float64 [layers, modules]; NaN where there is no site."""
        grid = np.full((len(self.layers), len(self.modules)), np.nan)
        for site, value in values.items():
            grid[self.places[site]] = value
        return grid


def layout_of(sites: Iterable[str]) -> Layout:
    """Lay out sites by their names, such as "model.layers.3.self_attn.q_proj" -> layer 3, q_proj.

    Columns keep the order of ``sites``. A site without a layer number counts as layer 0.
    """
    split = {site: _split(site) for site in sites}
    kinds = list(dict.fromkeys(kind for _, kind in split.values()))
    layers = sorted({layer for layer, _ in split.values()})
    places = {
        site: (layers.index(layer), kinds.index(kind)) for site, (layer, kind) in split.items()
    }
    return Layout(layers=layers, modules=_short(kinds), places=places)


def _split(site: str) -> tuple[int, str]:
    match = NUMBERED.fullmatch(site)
    return (0, site) if match is None else (int(match["layer"]), f"{match[1]}.{match['module']}")


def _short(kinds: list[str]) -> list[str]:
    """Shortest unique ending of each name: a.query, b.query, b.out -> a.query, b.query, out."""
    endings = [_endings(kind) for kind in kinds]
    seen = Counter(ending for own in endings for ending in own)
    return [next((e for e in own if seen[e] == 1), own[-1]) for own in endings]


def _endings(kind: str) -> list[str]:
    words = kind.split(".")
    return [".".join(words[i:]) for i in reversed(range(len(words)))]
