"""What a run does with what is known of its architecture (``model.look``): it packs documents only
if they do not see each other. Runs that began before architectures were looked at go on as they
were."""

from contextlib import suppress
from typing import cast

import torch
from transformers import PreTrainedModel

from sparse_lora_dist import checkpoint
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.attention import settle_attention
from sparse_lora_dist.model.look import (
    SEEN,
    documents_apart,
    inputs_of,
    settle_packing,
    settle_padded_rows,
)
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.model.targets import in_short
from sparse_lora_dist.run_folder.identity import LOOK
from sparse_lora_dist.tasks.loss_head import logits_of
from sparse_lora_dist.tasks.packed_attention import packed
from sparse_lora_dist.training.resume import own_checkpoints, source_of
from sparse_lora_dist.zero3.engine import Engine


def began_before(config: Config) -> bool:
    """Return True if the run that is resumed began before architectures were looked at, or looks
    as if it had because its architecture is a usual one. Collective.

    Args:
        config: options of the run.
    """
    found = False
    if comm.rank() == 0 and config.run.resume != "never":
        source = source_of(config)
        paths = checkpoint.published(own_checkpoints(config)) if source is None else [source]
        for path in paths[-1:]:
            with suppress(Exception):  # a damaged checkpoint is refused later
                found = LOOK not in checkpoint.read_manifest(path)["description"]
    return bool(comm.broadcast_object(found))


def settle(config: Config, model: Model) -> Config:
    """Return the options of the run, with packing off if packed documents would see each other, and
    choose the model's attention. Collective.

    Args:
        config: options of the run.
        model: the opened model. Its attention may be changed.

    Raises:
        UserError: ``--packing true`` was given, and they would; or a classifier's logits depend on
            padding; or ``--attn_implementation varlen`` cannot be used.
    """
    look, kind = model.look, model.module.config.model_type
    if not model.as_before or "data" in config.run.reset:
        if note := settle_padded_rows(model.module, look):
            print_line("note", note)
        config, notes = settle_packing(config, look, kind)
        for note in notes:
            print_line("note", note)
    if note := settle_attention(config, model.module):
        print_line("note", note)
    if model.as_before and (others := _otherwise(config, model)):
        print_line("note", f"this run goes on as it began, but {'; '.join(others)}")
    return config


def _otherwise(config: Config, model: Model) -> list[str]:
    """Return what a run that begins now would do in another way than one of before."""
    look, others = model.look, []
    if look.apart is False and config.packs:
        others.append(f"{SEEN.format(model.module.config.model_type)} (--packing false is right)")
    if found := [site.name for site in model.sites if site.name in look.unrun | look.read]:
        others.append(f"{in_short(found)} would get no adapter today")
    return others


def check_documents_apart(config: Config, engine: Engine) -> None:
    """Raise UserError if packed documents see each other in the loaded model. Collective.

    It is what ``look_at`` asks, of the weights, the kernels and the device of the run. To be called
    before the first step of a run that packs.

    Args:
        config: options of the run.
        engine: engine of the loaded model.
    """
    model = cast(PreTrainedModel, engine.model)
    inputs = inputs_of(model, "causal_lm", min(8, config.data.sequence_length // 2))
    flash = "flash" in (config.model.attn_implementation or "")
    with engine.evaluating(), packed(inputs["position_ids"], comm.device()):
        logits = logits_of(engine, inputs, by_row=flash)
    apart = documents_apart(logits, torch.finfo(logits.dtype).eps ** 0.5)
    if comm.largest(int(apart is False)):
        raise UserError(
            f"{SEEN.format(model.config.model_type)}. Set --packing false, which gives each "
            "document a row of its own.",
            shared=True,
        )
