"""Classifiers in whole runs on real ranks: one curve on any layout, exact resume, the numbers of
one process with PEFT, and what PEFT makes of the saved adapter."""

import json
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.tiny_classifier import MAKERS, framing_tokenizer, save_base, write_labelled
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import grid, in_full

TRAIN = "tests.work.run:train"
EXACT = ("step", "loss", "grad_norm", "held_out_loss", "held_out_accuracy", "held_out_matthews")
HEADS = ("classifier", "score", "pooler", "pre_classifier")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("bert")
    return write_labelled(folder, save_base(folder / "model", "bert-with-pooler"))


def flags_of(tiny: TinyRun, folder: Path, **options: object) -> list[str]:
    usual = {"task": "seq_cls", "sequence_length": 48, "eval_batches": 9, "max_steps": 6}
    return tiny.flags(folder, **usual | options)


def column(folder: Path, key: str) -> list[float]:
    return [row[key] for row in read_records(folder / "metrics.jsonl") if key in row]


# --- layouts and resume --------------------------------------------------------------------------

LONG = {"max_steps": 11, "eval_every": 4, "dropout": 0.2, "method": "adalora", "num_epochs": 2}


@pytest.fixture(scope="module")
def whole(ranks: Ranks, bert: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of 11 steps on 2 ranks in one go; 44 rows of 42 examples, 4 a step."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ranks(2, TRAIN, flags=flags_of(bert, folder, **LONG))
    return folder


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {"micro_batch_size": 4}),
        in_full(2, {"micro_batch_size": 1, "gradient_accumulation_steps": 2}),
        in_full(2, {"gradient_checkpointing": True}),
    ],
    ids=["one-rank", "accumulation", "checkpointing"],
)
def test_the_curve_does_not_depend_on_the_layout(
    ranks: Ranks, bert: TinyRun, whole: Path, tmp_path: Path, world: int, layout: dict[str, Any]
) -> None:
    ranks(world, TRAIN, flags=flags_of(bert, tmp_path, **LONG | layout))
    for key in ("loss", "grad_norm", "tokens", "held_out_loss"):
        assert column(tmp_path, key) == pytest.approx(column(whole, key), rel=1e-4), key
    for key in ("held_out_accuracy", "held_out_matthews"):
        assert column(tmp_path, key) == column(whole, key), "counts add up exactly"


def test_stop_and_resume_is_bit_for_bit_the_run_in_one_go(
    ranks: Ranks, bert: TinyRun, whole: Path, tmp_path: Path
) -> None:
    flags = flags_of(bert, tmp_path, **LONG)
    ranks(2, TRAIN, flags=[*flags, "--stop_after", "4"])
    ranks(2, TRAIN, flags=[*flags, "--resume", "auto"])
    rows = [read_records(folder / "metrics.jsonl") for folder in (tmp_path, whole)]
    exact = [[{k: row[k] for k in EXACT if k in row} for row in run] for run in rows]
    assert exact[0] == exact[1]
    weights = [f / "adapter" / "adapter_model.safetensors" for f in (tmp_path, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_last_step_of_an_epoch_counts_its_examples_and_no_filler(
    ranks: Ranks, bert: TinyRun, tmp_path: Path
) -> None:
    options = {"max_steps": "null", "num_epochs": 1, "learning_rate": 1e-9, "weight_decay": 0}
    ranks(2, TRAIN, flags=flags_of(bert, tmp_path, **options))
    losses = column(tmp_path, "loss")
    assert len(losses) == 11, "42 examples, 4 a step: the last step has 2"
    model = reference_model(bert.model, quantize=True)
    head = peft_state(tmp_path / "adapter", "classifier.")
    model.classifier.load_state_dict(head)
    each = [float(loss_of(model, [text], [label])) for text, label in examples_of(bert.data)]
    weighted = sum(4 * loss for loss in losses[:-1]) + 2 * losses[-1]
    assert weighted == pytest.approx(sum(each), rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "deberta"])
def test_no_step_draws_from_a_generator_that_ranks_do_not_share(
    ranks: Ranks, tmp_path: Path, family: str
) -> None:
    tiny = write_labelled(tmp_path, save_base(tmp_path / "model", family))
    flags = flags_of(tiny, tmp_path / "run", max_steps=2, dropout=0.1)
    assert ranks(2, "tests.work.class:draws_of_steps", flags=flags) == [[False] * 2] * 2


@pytest.mark.usefixtures("full")
def test_a_penalty_counts_once_where_a_layer_is_called_twice(ranks: Ranks, tmp_path: Path) -> None:
    def penalty(num_layers: int) -> dict[str, Tensor]:
        """What it adds to the gradients of a first step."""
        folder = tmp_path / str(num_layers)
        model = save_base(folder / "model", "albert", num_hidden_layers=num_layers)
        tiny, gradients = write_labelled(folder, model), []
        for weight in (0.1, 0.0):
            options = {"adalora_orthogonality": weight, "adalora_target_rank": 4, "stop_after": 1}
            flags = flags_of(tiny, folder / str(weight), method="adalora", **options)
            (first,) = ranks(1, "tests.work.engine:first_step", flags=flags)
            gradients.append(first.gradients)
        return {n: g - gradients[1][n] for n, g in gradients[0].items() if n.endswith("lora_a")}

    once, twice = penalty(1), penalty(2)  # ALBERT's layers are one layer: the same tensors
    torch.testing.assert_close(once, twice, rtol=0, atol=1e-5)
    assert min(g.norm() for g in once.values()) > 1e-2


# --- against one process -------------------------------------------------------------------------


def reference_model(folder: Path, *, quantize: bool, num_labels: int = 3) -> PreTrainedModel:
    """fp32, without dropout; linears but the head's through NF4 and back where ``quantize``."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=num_labels, dtype=torch.float32
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(HEADS) and quantize:
            # As one row: bitsandbytes 0.50.2 takes wrong scales for some widths on a CPU.
            packed, state = bnb.quantize_4bit(
                module.weight.data.flatten(), quant_type="nf4", compress_statistics=True
            )
            module.weight.data = bnb.dequantize_4bit(packed, state).view_as(module.weight)
    return model.eval()


def peft_state(adapter: Path, prefix: str) -> dict[str, Tensor]:
    begin = f"base_model.model.{prefix}"
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {key.removeprefix(begin): t for key, t in tensors.items() if key.startswith(begin)}


def examples_of(path: Path) -> list[tuple[str, int]]:
    """Text and class, which are numbered by the alphabet of the labels."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = sorted({row["label"] for row in rows})
    return [(row["text"], names.index(row["label"])) for row in rows]


def loss_of(model: nn.Module, texts: list[str], labels: list[int]) -> Tensor:
    inputs = framing_tokenizer()(texts, return_tensors="pt", padding=True)
    return F.cross_entropy(model(**inputs).logits, torch.tensor(labels))


@grid("family quantization", ["bert-with-pooler", "deberta"], ["nf4", "none"])
def test_first_loss_and_gradients_are_those_of_peft_in_one_process(
    ranks: Ranks, tmp_path: Path, family: str, quantization: str
) -> None:
    tiny = write_labelled(tmp_path, save_base(tmp_path / "model", family))
    base = reference_model(tiny.model, quantize=quantization == "nf4")
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=6.0,
        target_modules=[
            n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n[:2] in ("be", "de")
        ],
        modules_to_save=[n for n in ("pooler", "classifier") if hasattr(base, n)],
        task_type="SEQ_CLS",
    )
    model = peft.get_peft_model(base, lora).eval()
    generator = torch.Generator().manual_seed(1)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(tmp_path / "adapter")
    flags = flags_of(
        tiny,
        tmp_path / "run",
        max_steps=1,
        alpha=6.0,
        init_adapter=tmp_path / "adapter",
        quantization=quantization,
        gradient_accumulation_steps=2,
        text_pair_field="second",
    )
    everyone = ranks(2, "tests.work.engine:first_step", flags=flags)

    batches = [batch for rank in everyone for batch in rank.batches]
    sums = [
        F.cross_entropy(model(**b.inputs("cpu")).logits, b.labels_M, reduction="sum")
        for b in batches
    ]
    loss = torch.stack(sums).sum() / 8
    loss.backward()
    expected = {our_name(n): p.grad for n, p in trained.items()}
    for rank in everyone:
        assert rank.loss == pytest.approx(loss.item(), rel=1e-5)
        assert rank.gradients.keys() == expected.keys()
        for name, grad in expected.items():
            assert grad.norm() > 0, name
            distance = (rank.gradients[name] - grad).norm() / grad.norm()
            assert distance < 1e-4, name


def our_name(theirs: str) -> str:
    name = theirs.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
    return name.replace("lora_A.default.weight", "lora_a").replace(
        "lora_B.default.weight", "lora_b"
    )


# --- what is saved -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f if f in ("bert", "llama") else in_full(f) for f in MAKERS])
def test_peft_computes_the_logits_of_the_trained_engine(
    ranks: Ranks, tmp_path: Path, family: str
) -> None:
    tiny = write_labelled(tmp_path, save_base(tmp_path / "model", family))
    flags = flags_of(tiny, tmp_path / "run", max_steps=3, dropout=0.1, quantization="none")
    everyone = ranks(2, "tests.work.class:trained_logits", flags=flags)

    adapter = tmp_path / "run" / "adapter"
    names = json.loads((adapter / "id2label.json").read_text())
    assert names == {"0": "bad", "1": "good", "2": "ugly"}
    with warnings.catch_warnings():
        # What PEFT says of keys that are missing or left over.
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        base = reference_model(tiny.model, quantize=False, num_labels=len(names))
        model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    for batches, ours in everyone:
        with torch.no_grad():
            theirs = model(**batches[0].inputs("cpu")).logits
        assert theirs.numpy() == pytest.approx(ours.numpy(), abs=2e-5)
        assert ours.std() > 0.01
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS"
