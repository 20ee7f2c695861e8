"""Runs launcher/export.py: exports a checkpoint to a folder that appears only once complete."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from sparse_lora_dist.adapter.peft_agrees import not_applied
from sparse_lora_dist.adapter.peft_config import APART
from sparse_lora_dist.base_model.architecture import PRECISIONS, output_head
from sparse_lora_dist.config.paths import real_path, with_commas
from sparse_lora_dist.distributed.console import counted, megabytes, print_line
from sparse_lora_dist.distributed.phases import passes_later
from sparse_lora_dist.errors import StorageError, UserError, as_user_error
from sparse_lora_dist.export.card import CARD, SIGNATURE, write_card
from sparse_lora_dist.export.export_options import ExportConfig, ExportRequest
from sparse_lora_dist.export.merged import Merge
from sparse_lora_dist.export.open_base import Base
from sparse_lora_dist.export.peft_adapter import write_peft
from sparse_lora_dist.export.peft_own_type import write_own_type
from sparse_lora_dist.export.sparse_delta import write_sparse_delta
from sparse_lora_dist.export.sum_of_runs import Union
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.model.prompting import GENERATION, TEMPLATE
from sparse_lora_dist.run_folder.identity import TRAINED_OVER, Identity
from sparse_lora_dist.system.machine_errors import of_path
from sparse_lora_dist.system.own_files import (
    Marker,
    ascii_name,
    contents_of,
    foreign_in,
    in_short,
    read_marker,
    write_marker,
)
from sparse_lora_dist.system.whole_folders import (
    EXPORT,
    clean_up,
    finish,
    new_folder,
    own_names,
)

OF_THE_SYSTEM = ("lost+found", ".snapshot")
"""Folders that file systems make at mount points."""
OF_BEFORE = re.compile(
    r"README\.md|(adapter_|generation_)?config\.json|adapter_model\.safetensors"
    r"|modules_to_save\.safetensors|id2label\.json|trained_over\.json|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index\.json|sparse_delta(-\d{5}-of-\d{5})?\.(json|safetensors)|(tokenizer|special_tokens|"
    r"added_tokens|vocab|preprocessor_config|processor_config).*|merges\.txt|chat_template\.jinja"
)
"""Names of files in an export of a version that wrote no markers."""
NO_PROMPTING = (
    "was saved by a version that did not store the chat template and the tokens that end an "
    "answer, so the export has none but the base's own"
)
"""End of the line that is printed for such a checkpoint; its folder comes first."""
OWN_FORMS = {"neat": " (it has with --neat_form peft)"}
Summary = dict[str, str]
"""Label -> text about an export, e.g. "sparsity" -> "99.9%".

The texts are printed, and listed in the model card.
"""


def export(request: ExportRequest) -> None:
    """Export one checkpoint, or the sum of several, and print what was written.

    Runs in one process and needs no GPU. An existing output folder is replaced only once the new
    one is complete.

    Args:
        request: The run or checkpoint to export, and the options of the command line.

    Raises:
        UserError: The checkpoint, the base model or the output folder does not allow this export,
            or reading or writing fails.
        StorageError: Reading or writing fails in a way that may pass, e.g. because the disk is
            full.
    """
    # Through a link: the folder that it leads to is written, and the link stays.
    final = real_path("--output", Path(request.export.output))
    try:
        _export(request, final)
    except (OSError, SafetensorError) as error:  # a full disk may raise either
        if isinstance(error, OSError) and error.filename is None:
            print(flush=True)  # raises the error again if it is that of stdout
        kind = StorageError if passes_later(error) else UserError
        words = _of_another_path(error, final) or (
            f"The export could not be written to {final}: {error}. Check the free space and the "
            "permissions of the folder, then export again."
        )
        raise kind(words) from error


def _of_another_path(error: OSError | SafetensorError, final: Path) -> str | None:
    """Return what to do about a path that cannot be read and is not the output folder's, such as
    the base's; None for any other error."""
    named = getattr(error, "filename", None)
    if not isinstance(named, str):
        return None
    path = Path(os.path.abspath(named))
    inside = path.relative_to(final.parent).parts[:1] if path.is_relative_to(final.parent) else None
    is_own = inside == () or (inside is not None and final.name in inside[0])
    return None if is_own else of_path(error)  # unfinished folders have its name within theirs


def _export(request: ExportRequest, final: Path) -> None:
    asked = request.export
    for done in clean_up(final):
        print_line("cleaned", done)
    with as_user_error(request.source, "Give another run or checkpoint."):
        trained = _attach_base(Trained.open(Path(request.source)), asked)
    if asked.plus is not None:
        trained = Union.of(trained, with_commas(asked.plus.split(",")))
    _check_place(final, trained, asked)
    _check_writable(final)
    print_line("from", f"{trained.path}, step {trained.step:,}")
    if "prompting" not in trained.manifest and trained.config.model.task == "causal_lm":
        print_line("note", f"{trained.path} {NO_PROMPTING}")
    for other in trained.others if isinstance(trained, Union) else ():
        print_line("plus", f"{other.path}, step {other.step:,}")
    temporary: Path | None = None
    try:
        temporary = new_folder(final)
        summary = WRITERS[asked.format](trained, temporary, asked) | _prompting(trained)
        _write_base(trained, temporary, asked.format)
        write_card(trained, temporary, final, asked.format, summary)
        # Again: another export may have been faster.
        _check_place(final, trained, asked, but=temporary.name)
        _mark_export_of_before(final)
        left = finish(temporary, final, replaces=asked.overwrite)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    for text in left:
        print_line("warning", text)
    for name, text in summary.items():
        print_line(name, text)
    size = sum(path.stat().st_size for path in final.rglob("*") if path.is_file())
    print_line("written", f"{final} ({megabytes(size)}); {final}/{CARD} has the code that loads it")


def _attach_base(trained: Trained, asked: ExportConfig) -> Trained:
    """Open the run's base model if the run's update depends on the base's weights.

    Args:
        trained: The run to export.
        asked: Options of the export.

    Returns:
        A copy of the run with ``read_base`` set; the run itself if its update does not depend on
        the base's weights.

    Raises:
        UserError: --base or --trust_remote_code is given but has no effect, or the base model
            cannot be opened.
    """
    if not trained.reads_base:
        for name in ("base", "trust_remote_code"):
            if asked.format != "merged" and getattr(asked, name):
                raise UserError(
                    f"--{name} has no effect: exporting this run with --format {asked.format} "
                    "does not read the base model. Leave the option out."
                )
        return trained
    # If the run's base was saved in 4 bits, --base of a merge names the unquantised model, and
    # the update is computed from the run's own base.
    is_merge_target = asked.format == "merged" and trained.manifest["base_in_4_bits"]
    location, trusts = None if is_merge_target else asked.base, asked.trust_remote_code
    base = Base.open(trained, location, trust_remote_code=trusts, read_only=True)
    return replace(trained, read_base=base.weight)


def _check_place(final: Path, trained: Trained, asked: ExportConfig, *, but: str = "") -> None:
    """Raise UserError if the output folder must not be replaced.

    A missing or empty folder is allowed. A folder with files is allowed with --overwrite if it
    holds an earlier export and no other files, and is not the base model.

    Args:
        final: The output folder.
        trained: The run to export.
        asked: Options of the export.
        but: Name of this export's own unfinished folder, which lies in a mount point.
    """
    passed = (*OF_THE_SYSTEM, but)
    there = final.is_dir() and foreign_in(final, passed.__contains__)
    if not final.exists() or there == []:
        return
    if not asked.overwrite:
        raise UserError(
            f"--output {final} is not empty. Choose another folder, or add --overwrite to replace "
            "an earlier export."
        )
    is_export = final.is_dir() and _has_card(final)
    bases = {real_path("--base", Path(name)) for name in (trained.base, asked.base) if name}
    if not is_export or final in bases:
        what = "the base model" if final in bases else "not an earlier export"
        raise UserError(
            f"--output {final} is {what}, but --overwrite replaces only earlier exports. Choose "
            "another folder."
        )
    is_own = own_names(final) if read_marker(final) else _is_of_before
    others = [n for n in foreign_in(final, is_own) if n not in passed]
    if others:
        raise UserError(
            f"--output {final} holds {in_short(others)}, which no export has written, or which was "
            "changed since. --overwrite would remove it. Move it away, or choose another folder."
        )


def _check_writable(final: Path) -> None:
    """Raise UserError if an export cannot be put at ``final``, which hours of work would find."""
    if os.path.lexists(final) and not final.is_dir():
        raise UserError(f"--output {final} is no folder. Choose another folder.")
    existing = next(p for p in (final, *final.parents) if p.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        what = "not writable" if existing.is_dir() else "no folder"
        raise UserError(
            f"--output {final} cannot be used, since {existing} is {what}. Choose another folder."
        )


def _has_card(final: Path) -> bool:
    """Return True if a folder is an export: its model card says so."""
    card = final / CARD
    return card.is_file() and SIGNATURE in card.read_text(errors="replace")


def _is_of_before(name: str) -> bool:
    """Return True if an export of a version without markers may have written a file of this name.

    Such an export may also hold copies of the base model's files, which have other names.
    """
    return OF_BEFORE.fullmatch(name) is not None


def _mark_export_of_before(final: Path) -> None:
    if final.is_dir() and read_marker(final) is None and _has_card(final):
        names = {n: c for n, c in contents_of(final).items() if _is_of_before(n)}
        write_marker(final, Marker(kind=EXPORT, names=names))


def _write_base(trained: Trained, folder: Path, form: str) -> None:
    """Write beside an adapter what it was trained over, if the run stored it. A merged model has no
    base any more."""
    known = Identity.of_checkpoint(trained.manifest)
    if form != "merged" and known.weights is not None:
        text = known.of_base(in_4_bits=trained.manifest["base_in_4_bits"])
        (folder / TRAINED_OVER).write_text(text)


def _prompting(trained: Trained) -> Summary:
    """Return what the export says about how its model is prompted."""
    if (found := trained.prompting) is None:
        return {}
    template = "the tokenizer's own" if found.is_own else f"that of --chat_template, in {TEMPLATE}"
    of_chats = {} if found.chat_template is None else {"template": template}
    if not found.learned_ends:
        return of_chats | {"ends": "no token that ends an answer was learned"}
    ends = ", ".join(map(ascii_name, found.learned_ends))
    return of_chats | {"ends": f"answers end with {ends}, at which {GENERATION} stops"}


def _peft(trained: Trained, folder: Path, asked: ExportConfig) -> Summary:
    if asked.own_type or not trained.is_lora:
        if (own := trained.own_type()) and asked.uniform_rank:
            raise UserError(
                f"--uniform_rank is of LoRA, but --method {trained.method.name} exports as PEFT's "
                f"{own.kind}. Use --format merged or sparse_delta."
            )
        if own:
            write_own_type(folder, own)
            return {"modules": counted(len(own.forms), "linear"), "type": own.kind.lower()}
        if asked.own_type:
            has = OWN_FORMS.get(trained.method.name, "")
            raise UserError(
                f"--own_type is not possible with --method {trained.method.name}: PEFT has no "
                f"adapter type that computes the update of this run{has}. Leave the option out."
            )
    lora = trained.plain_lora()
    if asked.uniform_rank and trained.classes and lora.full:
        raise UserError(
            "--uniform_rank leaves out the classifier's head, which was trained in full, and PEFT "
            "cannot open a classifier without it. Leave the option out, or use --format merged."
        )
    write_peft(folder, lora, uniform=asked.uniform_rank)
    ranks = [len(a_LI) for a_LI, _ in lora.pairs.values()]
    live = sum(a_LI.numel() + b_OL.numel() for a_LI, b_OL in lora.pairs.values())
    summary = {
        "modules": f"{len(ranks)} of {counted(len(trained.sites), 'linear')}, rank {min(ranks)} to "
        f"{max(ranks)} (--rank of the run: {lora.rank})",
        "entries": f"{live:,} in components with a nonzero update",
    }
    if dropped := trained.manifest.get("dropped_by_peft"):
        summary["in PEFT"] = f"{not_applied(dropped)}. Use --format merged or sparse_delta"
    if asked.uniform_rank:
        summary["rank"] = f"{max(ranks)} for all modules, smaller ones padded with zeros"
        if lora.full:
            summary["apart"] = (
                f"{', '.join(lora.full_modules)} trained in full, saved in {APART}. "
                "LoRA servers do not read this file; use --format merged to keep these weights"
            )
    return summary


def _merged(trained: Trained, folder: Path, asked: ExportConfig) -> Summary:
    base = Base.open(trained, asked.base, trust_remote_code=asked.trust_remote_code)
    if asked.onto == "dequantised" and trained.manifest["base_in_4_bits"]:
        raise UserError(
            f"{base.folder} has unquantised weights, but the adapter was trained over a model that "
            "was saved in 4 bits, so --onto dequantised, the default, is not possible. Add "
            "--onto original to merge into the unquantised weights."
        )
    blocks = [name for name in base.tied if name != f"{output_head(base.module)}.weight"]
    if blocks:
        raise UserError(
            f"A merged model cannot be written: {blocks[0]} and {base.tied[blocks[0]][0]} are one "
            "weight in this architecture, and transformers would not read the others of these "
            "blocks back. Use --format peft or sparse_delta."
        )
    if asked.onto == "original" and trained.masks_base:
        raise UserError(
            f"--onto original is not possible with --method {trained.method.name}, which sets "
            "weights to zero by subtracting their 4-bit values. Subtracted from the original "
            "weights, these would not give zero. Leave --onto out."
        )
    merge = Merge(
        dtype=PRECISIONS[asked.dtype], stochastic=asked.rounding == "stochastic", onto=asked.onto
    )
    merge.write(trained, base, folder)
    over = "the weights that the adapter was trained over"
    summary = {"onto": "the original weights" if asked.onto == "original" else over}
    if merge.quantized:
        summary["onto"] += (
            f"; the 4-bit weights differ from the original ones by {merge.quantization_error:.1%} "
            "of their norm"
        )
    for name, others in base.tied.items():
        summary["untied"] = (
            f"{name} was trained and {others[0]}, which the base ties to it, was not. The model "
            "has both, and tie_word_embeddings is false"
        )
    if base.has_experts and base.quantized:
        summary["experts"] = "as in the base's files; the run had quantised them to 4 bits"
    share = merge.unchanged / max(merge.touched, 1)
    summary["rounding"] = (
        f"to {asked.dtype}, {asked.rounding}: {merge.unchanged:,} of {merge.touched:,} weights "
        f"with a nonzero update ({share:.1%}) keep their old value"
    )
    if share > 0.01 and asked.rounding == "nearest":
        summary["rounding"] += (
            "; use --rounding stochastic to keep the mean update, --dtype fp32 to keep each update"
        )
    return summary


def _sparse_delta(trained: Trained, folder: Path, asked: ExportConfig) -> Summary:
    found = write_sparse_delta(trained, folder)
    if trained.prompting is not None:
        trained.prompting.write(folder)
    summary = {
        "onto": "the weights of the model that you apply it to; the run was trained over "
        + ("4-bit" if trained.config.model.quantization == "nf4" else "the base's own")
        + " weights",
        "changed": f"{found.changed:,} of {found.weights:,} weights",
        "sparsity": f"{found.sparsity:.4%}; at least {found.bound:.4%} by RoseLoRA's Proposition 1",
    }
    if trained.full:
        summary["left out"] = f"{', '.join(trained.manifest['full_modules'])} (trained in full)"
    return summary


WRITERS: dict[str, Callable[[Trained, Path, ExportConfig], Summary]] = {
    "peft": _peft,
    "merged": _merged,
    "sparse_delta": _sparse_delta,
}
"""Value of ``--format`` -> function that writes an export of this format.

Each is called as function(run, folder, options), writes into the existing folder, and returns the
labels and texts that are printed and listed in the model card.
"""
