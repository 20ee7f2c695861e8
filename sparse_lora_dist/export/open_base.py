"""Opens the base model that an adapter was trained over, and reads its weights from the files."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.architecture import (
    meta_model,
    output_head,
    read_config,
    resolve_folder,
)
from sparse_lora_dist.base_model.safetensors_reader import (
    DTYPES,
    CheckpointFiles,
    Source,
    passed_over_in_words,
)
from sparse_lora_dist.base_model.same_on_all_nodes import fingerprint
from sparse_lora_dist.base_model.shard_loader import is_plain_linear
from sparse_lora_dist.base_model.weight_map import Keys, Packed, find_keys, is_quantized, source_of
from sparse_lora_dist.config.paths import resolve_default
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.model.look import look_at
from sparse_lora_dist.model.saved_class import SavedClass, find_saved_class
from sparse_lora_dist.run_folder.identity import BASE, LOOK, NOT_STORED, Identity, in_words
from sparse_lora_dist.tasks.class_head import ONE_LABEL


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model of a run: its files, and its module without weights. No method is collective.

    A "site" is a linear with an adapter (PEFT: target module).
    """

    folder: Path
    """Folder with config.json and the safetensors files."""
    files: CheckpointFiles
    """Reader of the safetensors files."""
    module: PreTrainedModel
    """The model without weights, on the meta device."""
    keys_of: Keys
    """Parameter name -> names of its tensors in the files.

    There are several for a parameter that the files hold in parts, e.g. stacked expert weights.
    """
    trained: Trained
    """The run that was trained over this base."""
    saved_class: SavedClass | None
    """Class that config.json names, if ``module`` is of another one."""

    @classmethod
    def open(
        cls,
        trained: Trained,
        location: str | None,
        *,
        trust_remote_code: bool,
        read_only: bool = False,
    ) -> "Base":
        """Open the base model of a run, and check that the run was trained over it.

        Args:
            trained: The run.
            location: Folder or hub id of the base; None for the one that the run names.
            trust_remote_code: True: run Python code that comes with the base.
            read_only: True: the weights are only read, to compute the update; the files may hold
                4-bit weights. False: merged weights are to be written, so the files must not hold
                4-bit weights. If it is False and the run was trained over files with 4-bit weights,
                any model of the same shapes is accepted, because the run does not know which model
                those files were quantised from.

        Returns:
            The opened base. No weights are read yet.

        Raises:
            UserError: The base is missing, is another model, is in 4 bits although merged weights
                are to be written, or needs Python code that was not allowed.
        """
        model, revision = location or trained.base, trained.config.model.revision
        try:
            folder = resolve_folder(resolve_default("model", model), revision)
        except UserError as error:
            raise UserError(f"{error} Give the base model's folder with --base FOLDER.") from error
        files = CheckpointFiles(folder)
        if files.passed_over:
            print_line("note", passed_over_in_words(files))
        _check_identity(trained, folder, files, read_only=read_only)
        if trained.config.model.trust_remote_code and not trust_remote_code:
            raise UserError(
                "The run was trained with --trust_remote_code, so this export would run Python "
                f"code from {folder}. If you trust that code, add --trust_remote_code."
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
        is_lm = trained.config.model.task == "causal_lm"
        found = cls(
            folder=folder,
            files=files,
            module=module,
            keys_of=keys_of,
            trained=trained,
            saved_class=find_saved_class(module, config, files, keys_of) if is_lm else None,
        )
        if not is_quantized(files):
            found._check_shapes()
        return found

    def _check_shapes(self) -> None:
        for site in self.trained.sites:
            keys = self.keys_of_site(site)
            shapes = [self.files.entries[key].shape for key in keys]
            if shapes != [(site.out_features, site.in_features)]:
                found = f"has shape {', '.join(map(str, shapes))}" if shapes else "is missing"
                raise UserError(
                    f"In {self.folder}, {site.name}.weight {found}, but the adapter was trained "
                    f"for shape {(site.out_features, site.in_features)}. Give the base model that "
                    "it was trained over with --base FOLDER."
                )

    def keys_of_site(self, site: Site) -> list[str]:
        """Return the names in the files of the tensors of a site's weight; [] if there are none.

        Args:
            site: One of the run's sites.
        """
        name = f"{site.name}.weight"
        tied = self.tied.get(name, ())
        return next((self.keys_of[n] for n in (name, *tied) if n in self.keys_of), [])

    @cached_property
    def tied(self) -> Mapping[str, list[str]]:
        """Name of a weight that an adapter changes -> names of the parameters that it is tied to,
        which the adapter does not change: the input embeddings, for the output head."""
        same = defaultdict(list)
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            same[id(parameter)].append(name)
        changed = [f"{site.name}.weight" for site in self.trained.sites]
        groups = {name: names for names in same.values() for name in names if len(names) > 1}
        return {name: [n for n in groups[name] if n != name] for name in changed if name in groups}

    def weight(self, site: Site) -> Tensor:
        """Return the base weight of a site as the run computed with it.

        Args:
            site: One of the run's sites.

        Returns:
            The weight, [out_features, in_features], in the run's precision. If the run held it in 4
            bits, these are the dequantised values.
        """
        (key,) = keys = self.keys_of_site(site)
        shape = site.out_features, site.in_features
        source = source_of(f"{site.name}.weight", shape, keys, self.files)
        if isinstance(source, Packed):
            packed, scales = (
                self.files.read(part, 0, part.nbytes) for part in (source.packed, source.scales)
            )
            return nf4.dequantize(
                nf4.parts_of(packed, scales, source.layout), source.layout, self.trained.dtype
            )
        w = self.read(key)
        # Of files in 4 bits, a weight in floats was left as it is.
        rounded = key in self.quantized and not is_quantized(self.files)
        w = self.dequantised(w, key) if rounded else w.to(self.trained.dtype)
        return w.view(shape)

    def read(self, key: str) -> Tensor:
        """Return the tensor named ``key`` in the base's files, flattened, in its stored dtype."""
        entry = self.files.entries[key]
        source = Source(keys=(key,), parts=(entry,), dtype=DTYPES[entry.dtype])
        return self.files.read(source, 0, entry.nbytes // entry.itemsize)

    def dequantised(self, w: Tensor, key: str) -> Tensor:
        """Quantise a weight to 4 bits as the run did, and dequantise it again.

        Args:
            w: Original weight, flattened.
            key: Name of the weight in the base's files, a key of ``quantized``.

        Returns:
            The dequantised weight, flattened, in the run's precision.
        """
        layout = self.quantized[key]
        packed, absmax = nf4.quantize(w, layout)
        scales = nf4.scale_bytes(absmax, nf4.offsets(absmax, layout), layout)
        parts = nf4.parts_of(packed, scales, layout)
        return nf4.dequantize(parts, layout, self.trained.dtype).flatten()

    @cached_property
    def quantized(self) -> Mapping[str, nf4.Layout]:
        """Tensor name in the files -> 4-bit layout, for the linear weights that the run quantised.

        The output head, modules trained in full, and linears whose weight the model uses without
        calling them are not quantised. Stacked expert weights (3-D), which the run may have
        quantised, are left out: a merge does not quantise them.
        """
        model = self.trained.config.model
        if model.quantization == "none":
            return {}
        head = output_head(self.module)
        kept = {*self.trained.manifest["full_modules"], *self._read_without_a_call}
        whole = tuple(f"{name}." for name in kept)
        found = {}
        for name, module in self.module.named_modules():
            if is_plain_linear(module) and name != head and not f"{name}.".startswith(whole):
                for key in self.keys_of[f"{name}.weight"]:
                    rows, columns = self.files.entries[key].shape
                    found[key] = nf4.Layout(shape=(rows, columns), double_quant=model.double_quant)
        return found

    @property
    def _read_without_a_call(self) -> frozenset[str]:
        """Names of linears whose weight the model uses without calling them; none for a run that
        began before architectures were looked at."""
        was_looked_at = LOOK in self.trained.manifest["description"]
        task = self.trained.config.model.task
        return look_at(self.module, task).read if was_looked_at else frozenset()

    @property
    def has_experts(self) -> bool:
        """True if the model has stacked expert weights (3-D), which a merge does not quantise."""
        return any(p.dim() == 3 for p in self.module.parameters())


def _check_identity(
    trained: Trained, folder: Path, files: CheckpointFiles, *, read_only: bool
) -> None:
    """Raise UserError if the model in ``folder`` is not one that ``Base.open`` accepts.

    Args:
        trained: The run that was trained over the base.
        folder: Folder of the model.
        files: Reader of the model's safetensors files.
        read_only: As in ``Base.open``.
    """
    if is_quantized(files) and not read_only:
        raise UserError(
            f"{folder} is quantised to 4 bits, and merged weights cannot be stored in that form. "
            "Give the model that it was quantised from, with --base FOLDER --onto original."
        )
    # A run over a base in 4 bits does not know which model that was quantised from, so any model
    # with the same shapes is accepted as the target of a merge.
    may_differ = trained.manifest["base_in_4_bits"] and not read_only
    if may_differ:
        return
    if differ := _differences(trained, folder, files):
        raise UserError(
            f"{folder} is not the base model that {trained.path} was trained over. What differs: "
            f"{differ}. Give an unchanged copy of {trained.base} with --base FOLDER."
        )


def _differences(trained: Trained, folder: Path, files: CheckpointFiles) -> str:
    """Return what of a model differs from the base of a run, in words; "" if nothing does."""
    here, then = fingerprint(folder, files), Identity.of_checkpoint(trained.manifest)
    if then.weights is not None:
        now = Identity(weights=here.weights, config=here.config)
        return in_words(then.differences(now, only=BASE))
    if here.headers != trained.manifest["description"]["base"]:
        return "its config.json or the headers of its weight files"
    print_line("note", f"{trained.path} {NOT_STORED}")
    return ""


def read_labelled_config(trained: Trained, folder: Path) -> PretrainedConfig:
    """Return the config of the base, with the run's class names if the run is a classifier.

    Args:
        trained: The run.
        folder: Folder of the base, with its config.json.
    """
    trusts = trained.config.model.trust_remote_code
    config = read_config(folder, trust_remote_code=trusts)
    if trained.classes:
        config.id2label = dict(enumerate(trained.classes))
        config.label2id = {name: number for number, name in config.id2label.items()}
        config.problem_type = ONE_LABEL  # the base may have been of several labels an example
    return config
