"""The base model that an adapter was trained over, as its files have it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.architecture import (
    identity,
    meta_model,
    output_head,
    read_config,
    resolve_folder,
)
from sparse_lora_dist.base_model.checkpoint_files import CheckpointFiles
from sparse_lora_dist.base_model.shard_loader import is_plain_linear
from sparse_lora_dist.base_model.sources import Keys, find_keys, is_quantized
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.trained import Trained
from sparse_lora_dist.locations import resolve_default
from sparse_lora_dist.plan.job import DTYPES


@dataclass(frozen=True, kw_only=True)
class Base:
    """Files, and which of their tensors is what in the model."""

    folder: Path
    files: CheckpointFiles
    module: PreTrainedModel
    """On the meta device."""
    keys_of: Keys
    trained: Trained

    @classmethod
    def open(cls, trained: Trained, folder: str | None) -> "Base":
        """The one that the run names, or ``folder`` where that has moved.

        Raises:
            UserError: it is another model, or one in 4 bits.
        """
        model = trained.config.model
        where = resolve_folder(resolve_default("model", folder or trained.base), model.revision)
        config = _with_labels(
            read_config(where, trust_remote_code=model.trust_remote_code), trained
        )
        files = CheckpointFiles(where)
        module = meta_model(
            config,
            task=model.task,
            dtype=DTYPES[model.precision],
            attn_implementation=None,
            trust_remote_code=model.trust_remote_code,
        )
        found = cls(
            folder=where,
            files=files,
            module=module,
            keys_of=find_keys(module, files),
            trained=trained,
        )
        found._check()
        return found

    def _check(self) -> None:
        was = self.trained.manifest["description"]["base"]
        if is_quantized(self.files):
            raise UserError(
                f"{self.folder} is in 4 bits, which merged weights would not fit into. Give the "
                "model that it was made from: --base FOLDER --onto original."
            )
        same = identity(self.folder, self.files) == was
        if not same and not self.trained_over_4_bits:
            raise UserError(
                f"{self.folder} is not the base of {self.trained.path}: its config.json or the "
                f"headers of its weights are others. --base takes a copy of {self.trained.base}."
            )
        for site in self.trained.sites:
            keys = self.keys_of.get(f"{site.name}.weight", [])
            shapes = [self.files.entries[key].shape for key in keys]
            if shapes != [(site.out_features, site.in_features)]:
                raise UserError(
                    f"{self.folder}: {site.name} is {shapes or 'not there'}, the adapter is for "
                    f"{[site.out_features, site.in_features]}. Give the base it was trained over."
                )

    @cached_property
    def trained_over_4_bits(self) -> bool:
        """Did the run load a checkpoint that was quantised already?"""
        said = resolve_folder(
            resolve_default("model", self.trained.base), self.trained.config.model.revision
        )
        return said != self.folder and is_quantized(CheckpointFiles(said))

    @cached_property
    def quantized(self) -> Mapping[str, nf4.Layout]:
        """Keys of the weights that the run had in 4 bits, experts but for, and how."""
        model = self.trained.config.model
        if model.quantization == "none":
            return {}
        head = output_head(self.module)
        whole = tuple(f"{name}." for name in self.trained.manifest["full_modules"])
        found = {}
        for name, module in self.module.named_modules():
            if is_plain_linear(module) and name != head and not f"{name}.".startswith(whole):
                for key in self.keys_of[f"{name}.weight"]:
                    rows, columns = self.files.entries[key].shape
                    found[key] = nf4.Layout(shape=(rows, columns), double_quant=model.double_quant)
        return found

    @property
    def experts(self) -> bool:
        """Are there weights of experts, which stay as the files have them?"""
        return any(p.dim() == 3 for p in self.module.parameters())


def _with_labels(config: PretrainedConfig, trained: Trained) -> Any:
    classes = trained.manifest["description"].get("classes", ())
    if classes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in config.id2label.items()}
    return config
