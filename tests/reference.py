"""The base model as transformers and bitsandbytes hold it, in one process: what ours must equal."""

from collections.abc import Sequence
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparse_lora_dist.data import Batch, Documents, load_documents


def whole_model(folder: Path, *, quantization: str, double_quant: bool = True) -> PreTrainedModel:
    """fp32, every linear but the head through NF4 and back where ``quantization`` is nf4."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head" and quantization == "nf4":
            weight = module.weight.data
            packed, state = bnb.quantize_4bit(
                weight, quant_type="nf4", compress_statistics=double_quant
            )
            module.weight.data = bnb.dequantize_4bit(packed, state).view_as(weight)
    return model.eval()


def documents_of(path: Path, model: Path) -> Documents:
    return load_documents(
        str(path),
        AutoTokenizer.from_pretrained(model),
        text_field="text",
        prompt_field="prompt",
        response_field="response",
        chat_template=None,
        train_on="response",
        sequence_length=64,
        max_samples=None,
    )


@torch.no_grad()
def loss_of_documents(model: nn.Module, documents: Documents) -> float:
    """Nats per target token, one document at a time."""
    total, targets = 0.0, 0
    for index in range(len(documents)):
        document = documents[index]
        logits_TV = model(input_ids=torch.tensor(document.input_ids).long()[None]).logits[0]
        labels_T = torch.tensor(document.labels).long()[1:]
        total += float(F.cross_entropy(logits_TV[:-1], labels_T, reduction="sum"))
        targets += int((labels_T >= 0).sum())
    return total / targets


def loss_of_batches(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """The mean over all target tokens of all batches."""
    sums, targets = [], 0
    for batch in batches:
        logits_MTV = model(
            input_ids=batch.input_ids_MT, position_ids=batch.position_ids_MT, use_cache=False
        ).logits
        labels = batch.labels_MT[:, 1:].flatten()
        sums.append(
            F.cross_entropy(logits_MTV[:, :-1].flatten(0, 1).float(), labels, reduction="sum")
        )
        targets += int((labels != -100).sum())
    return torch.stack(sums).sum() / targets
