"""The modules of a checkpoint, with rank and density as its method defines them."""

from collections.abc import Iterator, Mapping
from math import prod

from sparse_lora_dist.checkpoint import SavedSlices
from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.show.table import Module


def head(saved: Trained) -> str:
    """The line above the table: method, step and number of ranks."""
    return (
        f"saved     {saved.path}: {saved.config.adapter.method}, step {saved.step} of "
        f"{saved.manifest['total_steps']}, by {counted(saved.manifest['world_size'], 'rank')}"
    )


def modules(saved: Trained) -> Iterator[Module]:
    """Yield the modules, each read when it is asked for; those trained in full come last."""
    sizes = _bytes(saved.slices)
    for site in saved.sites:
        yield _adapted(saved, site, sizes)
    for name in saved.full:
        size = prod(saved.manifest["tensors"][name])
        yield Module(name=name, entries=size, alive=_num_live(saved, name), bytes=sizes[name])


def _adapted(saved: Trained, site: Site, sizes: Mapping[str, int]) -> Module:
    """A site. Tensors that all sites share are counted at the first site only."""
    form = saved.method.form(site)
    mine = [f"{site.name}.{key}" for key in form.tensors]
    names = [name for name in mine if name in saved.manifest["tensors"]]
    _, open_components = saved.manifest["sites"]["pieces"][site.name]
    change = None if saved.reads_base else saved.change(site)
    return Module(
        name=site.name,
        rank=open_components,
        capacity=form.num_components(site),
        entries=sum(prod(saved.manifest["tensors"][name]) for name in names),
        alive=sum(_num_live(saved, name) for name in names),
        bytes=sum(sizes[name] for name in names),
        norm=None if saved.reads_base else change.norm if change else 0.0,
    )


def _num_live(saved: Trained, name: str) -> int:
    """Number of entries that are live and not zero; a method may zero live entries."""
    size = prod(saved.manifest["tensors"][name])
    live, master = (saved.slices.entries(key, name, 0, size) for key in ("live", "master"))
    return int((live & (master != 0)).sum())


def _bytes(slices: SavedSlices) -> dict[str, int]:
    """Tensor -> bytes of all that is saved for it: fp32 master, live bits, statistics, moments."""
    sizes: dict[str, int] = {}
    for file in slices.files:
        for key in file.keys():  # noqa: SIM118  safe_open is no dict
            saved = file.get_slice(key)
            name = key.partition("/")[2]
            size = prod(saved.get_shape()) * WIDTHS[saved.get_dtype()]
            sizes[name] = sizes.get(name, 0) + size
    return sizes


WIDTHS = {"F32": 4, "I32": 4, "U8": 1, "F64": 8}
"""Bytes of an entry, by safetensors' name of its dtype."""
