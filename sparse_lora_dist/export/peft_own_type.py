"""An adapter as a type of PEFT's own, where it is no LoRA, or more than one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
from safetensors.torch import save_file

from sparse_lora_dist.adapter.peft_config import PREFIX, WEIGHTS
from sparse_lora_dist.export.peft_adapter import ForPeft, write_labels
from sparse_lora_dist.methods.protocol.form import PeftForm


@dataclass(frozen=True, kw_only=True)
class OwnType(ForPeft):
    """Of another type."""

    forms: Mapping[str, PeftForm]
    """By site; of one type all."""

    @property
    def kind(self) -> str:
        """PEFT's name of the type."""
        return next(iter(self.forms.values())).kind


def write_own_type(folder: Path, trained: OwnType) -> int:
    """Write adapter_config.json and adapter_model.safetensors; return the bytes of the latter.

    ``peft.PeftModel.from_pretrained(base, folder)`` gives the trained logits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{name}": t for name, t in trained.full.items()}
    for site, form in trained.forms.items():
        tensors |= {f"{PREFIX}{site}.{name}": t.contiguous() for name, t in form.tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    first = next(iter(trained.forms.values()))
    config_of: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[trained.kind]]
    config = config_of(
        task_type=trained.task_type,
        base_model_name_or_path=trained.base,
        revision=trained.revision,
        inference_mode=True,
        # Whole names: an ending might match a linear that has no adapter.
        target_modules=list(trained.forms),
        modules_to_save=list(trained.full_modules) or None,
        **first.config,
    )
    config.save_pretrained(str(folder))
    write_labels(folder, trained.classes)
    return (folder / WEIGHTS).stat().st_size
