"""A real job on two ranks against one process: its first step against bitsandbytes' own Linear4bit
and a LoRA written by hand, and several of AdaLoRA's and IncreLoRA's against B diag(lambda) A."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.conftest import Ranks
from tests.fixtures.reference import loss_of_batches, whole_model
from tests.fixtures.tiny_run import TinyRun
from tests.work.growth import Watched, whole_masters

RANK, ALPHA = 4, 6.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LoraOverLinear4bit(nn.Module):
    """y = x W^T + (alpha / rank) x A^T B^T"""

    def __init__(self, weight: Tensor, a_RI: Tensor, b_OR: Tensor, double_quant: bool) -> None:
        super().__init__()
        self.base = bnb.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compute_dtype=weight.dtype,
            compress_statistics=double_quant,
            quant_type="nf4",
        )
        self.base.weight = bnb.nn.Params4bit(
            weight.clone(),
            requires_grad=False,
            compress_statistics=double_quant,
            quant_type="nf4",
        )
        self.base.to(weight.device)  # this is when bitsandbytes quantises
        assert self.base.weight.dtype == torch.uint8
        self.lora_a = nn.Parameter(a_RI.to(weight.dtype))
        self.lora_b = nn.Parameter(b_OR.to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        # Scaled where ours scales: in bf16 the other order rounds 2% of a gradient elsewhere.
        y: Tensor = self.base(x) + (x @ self.lora_a.t() * (ALPHA / RANK)) @ self.lora_b.t()
        return y


@pytest.fixture(scope="module")
def adapter(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter in which B is not zero, so that A has gradients at the first step."""
    folder = tmp_path_factory.mktemp("reference") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny.model)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("precision", "double_quant", "tolerance"),
    [("fp32", True, 1e-5), ("fp32", False, 1e-5), ("bf16", True, 2e-2)],
)
def test_first_loss_and_gradients_are_those_of_one_process(
    ranks: Ranks,
    tiny: TinyRun,
    adapter: Path,
    tmp_path: Path,
    precision: str,
    double_quant: bool,
    tolerance: float,
) -> None:
    flags = tiny.flags(
        tmp_path,
        max_steps=1,
        rank=RANK,
        alpha=ALPHA,
        init_adapter=adapter,
        precision=precision,
        double_quant=double_quant,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
    )
    everyone = ranks(2, "tests.work.engine:first_step", flags=flags)
    batches = [batch for rank in everyone for batch in rank.batches]
    assert len(batches) == 4 and len({b.rows_M for b in batches}) == 4

    model = _reference(tiny.model, adapter, DTYPES[precision], double_quant=double_quant)
    loss = loss_of_batches(model, batches)
    loss.backward()
    for rank in everyone:
        torch.testing.assert_close(rank.loss, loss.item(), rtol=tolerance, atol=0)
        expected = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        assert expected.keys() == rank.gradients.keys() and len(expected) == 2 * 14
        for name, grad in expected.items():
            assert grad.norm() > 0
            distance = (rank.gradients[name] - grad).norm() / grad.norm()
            assert distance < tolerance, (name, distance)


def _reference(
    folder: Path, adapter: Path, dtype: torch.dtype, *, double_quant: bool
) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    values = load_file(adapter / "adapter_model.safetensors")
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for name in linears:
        a_RI, b_OR = (values[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        weight = model.get_submodule(name).weight.data
        model.set_submodule(name, LoraOverLinear4bit(weight, a_RI, b_OR, double_quant))
    return model.train()


# --- AdaLoRA and IncreLoRA with nothing to prune and nothing to grow -----------------------------

OFF = {
    "adalora": {"adalora_target_rank": RANK},
    "increlora": {"increlora_start_rank": RANK, "increlora_target_rank": RANK},
}
STEPS, RATE, DECAY, MAX_NORM, ORTHOGONALITY = 8, 2e-3, 0.1, 0.8, 0.1


class TripletOverLinear(nn.Module):
    """y = x W^T + (alpha / rank) x (B diag(lambda) A)^T"""

    def __init__(self, base: nn.Linear, a_RI: Tensor, b_OR: Tensor, lambda_R: Tensor) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Parameter(a_RI.clone()), nn.Parameter(b_OR.clone())
        self.lora_lambda = nn.Parameter(lambda_R.clone())

    def forward(self, x: Tensor) -> Tensor:
        delta_OI = self.lora_b @ torch.diag(self.lora_lambda) @ self.lora_a
        y: Tensor = self.base(x) + ALPHA / RANK * x @ delta_OI.t()
        return y

    def penalty(self) -> Tensor:
        """|A A^T - 1|^2 + |B^T B - 1|^2"""
        eye = torch.eye(RANK)
        grams = self.lora_a @ self.lora_a.t(), self.lora_b.t() @ self.lora_b
        return (grams[0] - eye).square().sum() + (grams[1] - eye).square().sum()


@pytest.mark.parametrize("method", OFF)
def test_off_is_adamw_on_b_diag_lambda_a_with_the_penalty_in_the_loss(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, method: str
) -> None:
    flags = tiny.flags(
        tmp_path,
        method=method,
        max_steps=STEPS,
        rank=RANK,
        alpha=ALPHA,
        learning_rate=RATE,
        lr_schedule="constant",
        weight_decay=DECAY,
        max_grad_norm=MAX_NORM,
        micro_batch_size=1,
        gradient_accumulation_steps=2,
        **OFF[method] | {f"{method}_orthogonality": ORTHOGONALITY},
    )
    everyone: list[Watched] = ranks(2, "tests.work.growth:watch", flags=flags)
    masters = whole_masters(everyone)

    model = whole_model(tiny.model, quantization="nf4").requires_grad_(False).train()
    triplets = _with_triplets(model, masters[0])
    usual = [p for t in triplets for p in (t.lora_a, t.lora_b)]
    # Lambda's own rate: sqrt(out_features / 3) of the run's.
    groups = [
        {"params": [t.lora_lambda], "lr": RATE * (t.base.out_features / 3) ** 0.5} for t in triplets
    ]
    adamw = torch.optim.AdamW([{"params": usual}, *groups], lr=RATE, weight_decay=DECAY)
    norms: list[float] = []
    for step in range(STEPS):
        batches = [batch for rank in everyone for batch in rank.batches[step]]
        assert len(batches) == 4
        adamw.zero_grad()
        loss = loss_of_batches(model, batches)
        (loss + ORTHOGONALITY * torch.stack([t.penalty() for t in triplets]).sum()).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        adamw.step()
        for rank in everyone:
            assert rank.losses[step] == pytest.approx(loss.item(), abs=1e-5)
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        torch.testing.assert_close(masters[step + 1], trained, rtol=0, atol=1e-5)
    assert min(norms) < MAX_NORM < max(norms)


def _with_triplets(model: PreTrainedModel, values: dict[str, Tensor]) -> list[TripletOverLinear]:
    """Put one over each linear that has values."""
    triplets = []
    for name in dict.fromkeys(key.rpartition(".")[0] for key in values):
        parts = (values[f"{name}.lora_{x}"] for x in ("a", "b", "lambda"))
        triplets.append(TripletOverLinear(model.get_submodule(name), *parts))
        model.set_submodule(name, triplets[-1])
    return triplets
