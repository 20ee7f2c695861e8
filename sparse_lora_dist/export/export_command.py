"""launcher/export.py: from a checkpoint to a folder that is whole, or not there."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from sparse_lora_dist.adapter.peft_config import APART
from sparse_lora_dist.base_model.architecture import PRECISIONS
from sparse_lora_dist.distributed.console import counted, megabytes, print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.card import CARD, SIGNATURE, write_card
from sparse_lora_dist.export.export_options import ExportConfig, ExportRequest
from sparse_lora_dist.export.merged import Merge
from sparse_lora_dist.export.open_base import Base
from sparse_lora_dist.export.peft_adapter import write_peft
from sparse_lora_dist.export.peft_own_type import write_own_type
from sparse_lora_dist.export.sparse_delta import write_sparse_delta
from sparse_lora_dist.export.sum_of_runs import Union
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.system.atomic_files import TEMPORARY, put_in_place, sync_all

Facts = dict[str, str]
"""Of an export, by name: said on the screen, and on the model's card."""


def export(request: ExportRequest) -> None:
    """Write what is asked.

    Raises:
        UserError: there is nothing to export, or something in the way.
    """
    asked, final = request.export, Path(request.export.output).expanduser().resolve()
    trained = with_base(Trained.open(Path(request.source)), asked)
    if asked.plus is not None:
        trained = Union.of(trained, [source.strip() for source in asked.plus.split(",")])
    _check_place(final, trained, asked)
    print_line("from", f"{trained.path}, step {trained.step:,}")
    for other in trained.others if isinstance(trained, Union) else ():
        print_line("plus", f"{other.path}, step {other.step:,}")
    temporary = final.with_name(f"{TEMPORARY}{final.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        summary = WRITERS[asked.format](trained, temporary, asked)
        write_card(trained, temporary, final, asked.format, summary)
        sync_all(temporary)
        put_in_place(temporary, final)
    except (OSError, SafetensorError) as error:  # a full disk is either
        raise UserError(f"exporting to {final}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for name, text in summary.items():
        print_line(name, text)
    size = sum(path.stat().st_size for path in final.rglob("*") if path.is_file())
    print_line("written", f"{final} ({megabytes(size)}); {final}/{CARD} has the lines that load it")


def with_base(trained: Trained, asked: ExportConfig) -> Trained:
    """Where what is added depends on the base's weights, the one that can read them."""
    if not trained.reads_base:
        for name in ("base", "trust_remote_code"):
            if asked.format != "merged" and getattr(asked, name):
                raise UserError(f"--{name}: --format {asked.format} of this run reads no base.")
        return trained
    # What a merge writes onto need not be what the run read.
    other = asked.format == "merged" and trained.manifest["base_in_4_bits"]
    elsewhere, trusts = None if other else asked.base, asked.trust_remote_code
    base = Base.open(trained, elsewhere, trust_remote_code=trusts, to_read=True)
    return replace(trained, read_base=base.weight)


def _check_place(final: Path, trained: Trained, asked: ExportConfig) -> None:
    """An export replaces nothing but an export, and never the base that it is for."""
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not asked.overwrite:
        raise UserError(f"--output {final} is not empty. Name another folder, or add --overwrite.")
    card = final / CARD
    is_export = card.is_file() and SIGNATURE in card.read_text(errors="replace")
    bases = {Path(name).resolve() for name in (trained.base, asked.base) if name}
    if not is_export or final in bases:
        what = "the base model" if final in bases else "no earlier export"
        raise UserError(f"--overwrite: {final} is {what}, and stays. Name another folder.")


def _peft(trained: Trained, folder: Path, asked: ExportConfig) -> Facts:
    if asked.own_type or not trained.is_lora:
        if own := trained.own_type():
            write_own_type(folder, own)
            return {"modules": counted(len(own.forms), "linear"), "type": own.kind.lower()}
        if asked.own_type:
            raise UserError(
                f"--own_type: PEFT has no type of --method {trained.method.name} as it was trained "
                "here. Leave the flag out."
            )
    lora = trained.plain_lora()
    write_peft(folder, lora, uniform=asked.uniform_rank)
    ranks = [len(a_LI) for a_LI, _ in lora.pairs.values()]
    live = sum(a_LI.numel() + b_OL.numel() for a_LI, b_OL in lora.pairs.values())
    summary = {
        "modules": f"{len(ranks)} of {counted(len(trained.sites), 'linear')}, of rank "
        f"{min(ranks)} to {max(ranks)} (the run's: {lora.rank})",
        "entries": f"{live:,} in components that do something",
    }
    if asked.uniform_rank:
        summary["rank"] = f"{max(ranks)} everywhere, filled up with zeros"
        if lora.full:
            summary["apart"] = (
                f"{', '.join(lora.full_modules)} trained in full, in {APART}: "
                "servers of LoRA do not read it; use --format merged to keep it"
            )
    return summary


def _merged(trained: Trained, folder: Path, asked: ExportConfig) -> Facts:
    base = Base.open(trained, asked.base, trust_remote_code=asked.trust_remote_code)
    if asked.onto == "dequantised" and trained.manifest["base_in_4_bits"]:
        raise UserError(
            f"{base.folder} is not what the adapter was trained over, which came in 4 bits: add "
            "--onto original."
        )
    if asked.onto == "original" and trained.masks_base:
        raise UserError(
            f"--onto original: --method {trained.method.name} takes weights away as it had them, "
            "in 4 bits; of the original ones something would be left. Leave the flag out."
        )
    merge = Merge(
        dtype=PRECISIONS[asked.dtype], stochastic=asked.rounding == "stochastic", onto=asked.onto
    )
    merge.write(trained, base, folder)
    where = "the original weights" if asked.onto == "original" else "what it was trained over"
    summary = {"onto": where}
    if merge.quantized:
        summary["onto"] += (
            f"; original and 4-bit weights are {merge.distance:.1%} of their norm apart"
        )
    if base.experts and base.quantized:
        summary["experts"] = "as the files have them, not as the run had them in 4 bits"
    share = merge.unchanged / max(merge.touched, 1)
    summary["rounding"] = (
        f"to {asked.dtype}, {asked.rounding}: {merge.unchanged:,} of {merge.touched:,} touched "
        f"weights ({share:.1%}) stay as they were"
    )
    if share > 0.01 and asked.rounding == "nearest":
        summary["rounding"] += "; --rounding stochastic keeps their mean, --dtype fp32 all"
    return summary


def _sparse_delta(trained: Trained, folder: Path, asked: ExportConfig) -> Facts:
    found = write_sparse_delta(trained, folder)
    summary = {
        "onto": "the weights of whoever loads it; it was trained over "
        + ("4-bit ones" if trained.config.model.quantization == "nf4" else "the base's own"),
        "changed": f"{found.changed:,} of {found.weights:,} weights",
        "sparsity": f"{found.zeros:.4%}; at least {found.bound:.4%} by RoseLoRA's Proposition 1",
    }
    if trained.full:
        summary["left out"] = f"{', '.join(trained.manifest['full_modules'])}, trained in full"
    return summary


WRITERS: dict[str, Callable[[Trained, Path, ExportConfig], Facts]] = {
    "peft": _peft,
    "merged": _merged,
    "sparse_delta": _sparse_delta,
}
"""By the name that ``--format`` takes."""
