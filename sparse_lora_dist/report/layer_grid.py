"""Names of sites -> a grid: a row a layer, a column a kind of module."""

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
    """Where each site stands."""

    layers: list[int]
    modules: list[str]
    """As short as tells them apart: q_proj, but encoder.query and decoder.query."""
    places: Mapping[str, tuple[int, int]]
    """Site -> row and column."""

    def grid(self, values: Mapping[str, float]) -> Grid:
        """[layers, modules], nan where there is no site."""
        grid = np.full((len(self.layers), len(self.modules)), np.nan)
        for site, value in values.items():
            grid[self.places[site]] = value
        return grid


def layout_of(sites: Iterable[str]) -> Layout:
    """The grid of these sites, in their order; one without a layer's number stands in row 0."""
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
    """The fewest last words of each that no other has."""
    endings = [_endings(kind) for kind in kinds]
    seen = Counter(ending for own in endings for ending in own)
    return [next((e for e in own if seen[e] == 1), own[-1]) for own in endings]


def _endings(kind: str) -> list[str]:
    words = kind.split(".")
    return [".".join(words[i:]) for i in reversed(range(len(words)))]
