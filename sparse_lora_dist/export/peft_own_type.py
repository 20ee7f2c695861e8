"""Writes an adapter as another PEFT type than LoRA, e.g. SHiRA, or PEANUT for NEAT.

Used for methods whose update is not a LoRA, and with ``--own_type`` for any method that has a PEFT
type.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

from sparse_lora_dist.adapter.peft_config import PREFIX, WEIGHTS
from sparse_lora_dist.export.peft_adapter import PeftAdapter
from sparse_lora_dist.methods.protocol.form import PeftForm
from sparse_lora_dist.system.tensor_files import save_file


@dataclass(frozen=True, kw_only=True)
class OwnType(PeftAdapter):
    """Content of a PEFT adapter folder of another type than LoRA."""

    forms: Mapping[str, PeftForm]
    """Name of a linear with an adapter -> its tensors and settings as PEFT stores them.

    All linears have the same PEFT type and settings.
    """

    @property
    def kind(self) -> str:
        """Name of the PEFT type, a member of ``peft.PeftType``, e.g. SHIRA."""
        return next(iter(self.forms.values())).kind


def write_own_type(folder: Path, trained: OwnType) -> int:
    """Write an adapter of another PEFT type as adapter_config.json and adapter_model.safetensors.

    ``peft.PeftModel.from_pretrained(base, folder)`` then computes the same logits as the trained
    model. Not collective.

    Args:
        folder: Folder to write into; created if it is missing.
        trained: The adapter, whole and in memory.

    Returns:
        Size of adapter_model.safetensors in bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{trained.named(name)}": t for name, t in trained.full.items()}
    forms = {trained.named(site): form for site, form in trained.forms.items()}
    for site, form in forms.items():
        tensors |= {f"{PREFIX}{site}.{name}": t.contiguous() for name, t in form.tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    first = next(iter(trained.forms.values()))
    config_of: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[trained.kind]]
    config = config_of(
        task_type=trained.task_type,
        base_model_name_or_path=trained.base,
        revision=trained.revision,
        inference_mode=True,
        # Full names: PEFT matches suffixes, which may fit a linear without an adapter.
        target_modules=list(forms),
        modules_to_save=trained.modules_to_save,
        **first.config,
    )
    config.save_pretrained(str(folder))
    trained.write_beside(folder)
    return (folder / WEIGHTS).stat().st_size
