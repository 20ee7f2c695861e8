"""Reads the trained modules of a checkpoint for the table: their ranks, numbers of entries that are
not zero, bytes and norms."""

from collections.abc import Iterator, Mapping
from math import prod

from sparse_lora_dist.checkpoint import SavedSlices
from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.show.table import Module


def head(saved: Trained) -> str:
    """Return the line above the table: folder, method, step and number of ranks."""
    return (
        f"saved     {saved.path}: {saved.config.adapter.method}, step {saved.step} of "
        f"{saved.manifest['total_steps']}, by {counted(saved.manifest['world_size'], 'rank')}"
    )


def modules(saved: Trained) -> Iterator[Module]:
    """Yield the trained modules of a checkpoint.

    The linears that carry adapters (sites) come first, in the model's order, then the modules
    trained in full. A module's tensors are read when it is yielded.

    Args:
        saved: the open checkpoint, with the method and the options of its run.
    """
    sizes = _bytes(saved.slices)
    for site in saved.sites:
        yield _adapted(saved, site, sizes)
    for name in saved.full:
        size = prod(saved.manifest["tensors"][name])
        yield Module(name=name, entries=size, alive=_num_live(saved, name), bytes=sizes[name])


def _adapted(saved: Trained, site: Site, sizes: Mapping[str, int]) -> Module:
    """Return the table's row for a linear that carries an adapter. Tensors that all sites share are
    counted at the first site only.

    Args:
        saved: the open checkpoint.
        site: the linear.
        sizes: bytes saved for each tensor, by its name.
    """
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
    """Return the number of entries of the tensor ``name`` that are live and not zero.

    An entry is live if the optimizer steps it. Both are tested, because a method may set live
    entries to zero.
    """
    size = prod(saved.manifest["tensors"][name])
    live, master = (saved.slices.entries(key, name, 0, size) for key in ("live", "master"))
    return int((live & (master != 0)).sum())


def _bytes(slices: SavedSlices) -> dict[str, int]:
    """Return the bytes that a checkpoint holds for each tensor: name of a tensor -> bytes.

    This counts the fp32 master values of a tensor, the bits that mark its live entries, its running
    statistics and its optimizer moments, summed over all ranks.
    """
    sizes: dict[str, int] = {}
    for file in slices.files:
        for key in file.keys():  # noqa: SIM118  safe_open is no dict
            saved = file.get_slice(key)
            name = key.partition("/")[2]
            size = prod(saved.get_shape()) * WIDTHS[saved.get_dtype()]
            sizes[name] = sizes.get(name, 0) + size
    return sizes


WIDTHS = {"F32": 4, "I32": 4, "U8": 1, "F64": 8}
"""Name of a dtype in safetensors -> bytes of an entry."""
