"""Bar plot of the memory that one rank needs (on its GPU or on a CPU) by the number of ranks."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.plan.memory import Place, rank_memory
from sparse_lora_dist.plan.output import Outcome
from sparse_lora_dist.system.atomic_files import write_whole

MADE_BY = "sparse_lora_dist plan"
"""Text that marks the files that this program writes. It replaces no others."""
WORLDS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of ranks that have a bar, besides the planned one."""


def draw(outcome: Outcome, path: Path) -> None:
    """Write a plot of the memory of one rank in forward and backward, a bar per number of ranks.

    Each bar is a stack of the lines of the memory table. For ranks on GPUs, a dashed line marks the
    memory of a GPU.

    Args:
        outcome: the planned run with its results.
        path: the PNG file to write.

    Raises:
        UserError: if the file cannot be written.
    """
    # Imported here because it takes a second and only --plot needs it.
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    place: Place = "gpu" if outcome.ranks.on_gpu else "host"
    worlds = sorted({*WORLDS, outcome.ranks.world_size})
    stacks: dict[str, list[float]] = {}
    for column, count in enumerate(worlds):
        nodes = -(-count // outcome.ranks.per_node)
        ranks = replace(outcome.ranks, world_size=count, nodes=nodes)
        # hpZ's copy cannot be spread over more ranks than there are.
        engine = replace(outcome.engine, hpz=min(outcome.engine.hpz, count))
        memory = rank_memory(outcome.shapes, engine, ranks)
        for line in memory.lines:
            if line.place == place and line.bytes.get("pass"):
                stacks.setdefault(line.label, [0.0] * len(worlds))
                stacks[line.label][column] = line.bytes["pass"] / 1e9
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    bottom = [0.0] * len(worlds)
    colours = pyplot.get_cmap("tab20")
    names = [str(count) for count in worlds]
    for i, (label, heights) in enumerate(stacks.items()):
        axes.bar(names, heights, bottom=bottom, label=label, color=colours(i % 20))
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    if outcome.ranks.on_gpu:
        limit = outcome.limits.gpu / 1e9
        axes.axhline(limit, color="black", linestyle="--", label=f"a GPU: {limit:g} GB")
    axes.set_xlabel("ranks")
    axes.set_ylabel(f"GB of {'a GPU' if outcome.ranks.on_gpu else 'a rank'}, forward and backward")
    figure.legend(loc="outside right upper", fontsize="small")
    try:
        if path.exists() and MADE_BY.encode() not in path.read_bytes():
            raise UserError(
                f"--plot {path} is not a plot of this program, so it is not replaced. Name another "
                "file."
            )
        drawn = BytesIO()
        form = path.suffix.removeprefix(".") or "png"
        name = {"png": "Software", "pdf": "Creator", "svg": "Creator"}.get(form)
        metadata = {} if name is None else {name: MADE_BY}
        figure.savefig(drawn, format=form, dpi=120, metadata=metadata)
        write_whole(path, drawn.getvalue())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--plot {path} cannot be written: {error}. Name a PNG file in a folder that exists "
            "and that you can write to."
        ) from error
    finally:
        pyplot.close(figure)
