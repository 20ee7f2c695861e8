"""The base model that an adapter was trained over, as its files have it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.architecture import (
    identity,
    meta_model,
    output_head,
    read_config,
    resolve_folder,
)
from sparse_lora_dist.base_model.safetensors_reader import DTYPES, CheckpointFiles, Source
from sparse_lora_dist.base_model.shard_loader import is_plain_linear
from sparse_lora_dist.base_model.weight_map import Keys, Packed, find_keys, is_quantized, source_of
from sparse_lora_dist.config.paths import resolve_default
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.methods.protocol.form import Site


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
    def open(
        cls,
        trained: Trained,
        elsewhere: str | None,
        *,
        trust_remote_code: bool,
        to_read: bool = False,
    ) -> "Base":
        """The one that the run names, or ``elsewhere`` where that has moved.

        Args:
            to_read: its weights are only looked at, so they may be in 4 bits, and must be the
                run's own.

        Raises:
            UserError: it is not there, another model, one in 4 bits, or one with code of its own.
        """
        model, revision = elsewhere or trained.base, trained.config.model.revision
        try:
            folder = resolve_folder(resolve_default("model", model), revision)
        except UserError as error:
            raise UserError(f"{error} Name the folder of the base model: --base.") from error
        files = CheckpointFiles(folder)
        _check_identity(trained, folder, files, to_read=to_read)
        if trained.config.model.trust_remote_code and not trust_remote_code:
            raise UserError(
                f"the run was told --trust_remote_code: Python code that comes with {folder} would "
                "run. If you trust it, say so here too."
            )
        config = read_labelled_config(trained, folder)
        module = meta_model(
            config,
            task=trained.config.model.task,
            dtype=trained.dtype,
            attn_implementation=None,
            trust_remote_code=trust_remote_code,
        )
        keys_of = find_keys(module, files)
        found = cls(folder=folder, files=files, module=module, keys_of=keys_of, trained=trained)
        if not is_quantized(files):
            found._check_shapes()
        return found

    def _check_shapes(self) -> None:
        for site in self.trained.sites:
            keys = self.keys_of.get(f"{site.name}.weight", [])
            shapes = [self.files.entries[key].shape for key in keys]
            if shapes != [(site.out_features, site.in_features)]:
                raise UserError(
                    f"{self.folder}: {site.name} is {shapes or 'not there'}, the adapter is for "
                    f"{[site.out_features, site.in_features]}. Give the base it was trained over."
                )

    def weight(self, site: Site) -> Tensor:
        """w_OI of an adapted linear as the run had it."""
        (key,) = keys = self.keys_of[f"{site.name}.weight"]
        shape = site.out_features, site.in_features
        source = source_of(f"{site.name}.weight", shape, keys, self.files)
        if isinstance(source, Packed):
            packed, scales = (
                self.files.read(part, 0, part.nbytes) for part in (source.packed, source.scales)
            )
            return nf4.dequantize(packed, scales, source.layout, self.trained.dtype)
        w = self.read(key)
        w = self.dequantised(w, key) if key in self.quantized else w.to(self.trained.dtype)
        return w.view(shape)

    def read(self, key: str) -> Tensor:
        """A tensor as the files have it, flattened."""
        entry = self.files.entries[key]
        source = Source(keys=(key,), parts=(entry,), dtype=DTYPES[entry.dtype])
        return self.files.read(source, 0, entry.nbytes // entry.itemsize)

    def dequantised(self, w: Tensor, key: str) -> Tensor:
        """A weight that the run had in 4 bits as these have it, flattened."""
        layout = self.quantized[key]
        packed, absmax = nf4.quantize(w, layout)
        scales = nf4.scale_bytes(absmax, nf4.offsets(absmax, layout), layout)
        return nf4.dequantize(packed, scales, layout, self.trained.dtype).flatten()

    @cached_property
    def quantized(self) -> Mapping[str, nf4.Layout]:
        """Keys of the weights that the run had in 4 bits, but for experts, and how."""
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


def _check_identity(
    trained: Trained, folder: Path, files: CheckpointFiles, *, to_read: bool
) -> None:
    if is_quantized(files) and not to_read:
        raise UserError(
            f"{folder} is in 4 bits, which merged weights would not fit into. Give the model that "
            "it was made from: --base FOLDER --onto original."
        )
    # What a run's 4 bits were made from cannot be known.
    may_differ = trained.manifest["base_in_4_bits"] and not to_read
    same = identity(folder, files) == trained.manifest["description"]["base"]
    if not same and not may_differ:
        raise UserError(
            f"{folder} is not the base of {trained.path}: its config.json or the headers of its "
            f"weights are others. --base takes a copy of {trained.base}."
        )


def read_labelled_config(trained: Trained, folder: Path) -> PretrainedConfig:
    """The base's config.json, with the classes that a classifier was trained for."""
    trusts = trained.config.model.trust_remote_code
    config = read_config(folder, trust_remote_code=trusts)
    if trained.classes:
        config.id2label = dict(enumerate(trained.classes))
        config.label2id = {name: number for number, name in config.id2label.items()}
    return config
