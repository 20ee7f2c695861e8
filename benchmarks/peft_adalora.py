"""Do the lambdas that AdaLoRA masks stay masked under ZeRO-3? PEFT, and this project.

    python benchmarks/peft_adalora.py

A random Llama of two layers has 14 linears of 16 components; 4 components per linear are kept, and
the choice is final at step 20 of 30. PEFT writes zeros into its parameters, which under ZeRO-3 are
empty, or low-precision copies of fp32 masters; this project writes the masters in the optimizer
step.
"""

import argparse
import tempfile
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _side_by_side import RATE, build, on_ranks, random_rows, save_llama  # isort: skip  # sets the path

import deepspeed
import torch
from _job import write
from torch import Tensor, nn

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others
from sparse_lora_dist.zero3.parameters import gathered

RANKS, TOKENS, PIECES, TARGET = 2, 32, 16, 4
STEPS, BEGIN, EVERY, FREEZE = 30, 5, 10, 20
ZERO = {
    "sharded": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "whole on every rank": {"stage": 3},  # DeepSpeed's threshold keeps tensors this small
}

Counts = dict[str, list[int]]
"""When -> masked lambdas, and how many of them are exactly zero: as forward uses them, in the fp32
masters."""


def peft_model(folder: str) -> Any:
    """AdaLoRA on all linears, as PEFT sets it up."""
    from peft import AdaLoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    adalora = AdaLoraConfig(
        init_r=PIECES,
        target_r=TARGET,
        tinit=BEGIN,
        tfinal=STEPS - FREEZE,
        deltaT=EVERY,
        total_step=STEPS,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adalora, autocast_adapter_dtype=False)


def peft_under_zero3(folder: str, *, zero: dict[str, Any], masks_first: bool) -> Counts:
    """PEFT's AdaLoRA on a DeepSpeed engine. Collective."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    engine_config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    alive_for_transformers = HfDeepSpeedConfig(engine_config)  # noqa: F841
    model = peft_model(folder)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config)
    engine.train()

    def backward(step: int) -> None:
        engine.backward(engine(**inputs(step)).loss)

    master = deepspeed.utils.safe_get_full_fp32_param
    return train_peft(model, backward, engine.step, master, masks_first=masks_first)


def peft_alone(folder: str) -> Counts:
    """PEFT's AdaLoRA in one process, without DeepSpeed: what it is meant to do."""
    model = peft_model(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def backward(step: int) -> None:
        optimizer.zero_grad()
        model(**inputs(step)).loss.backward()

    return train_peft(model, backward, optimizer.step, lambda p: p.data, masks_first=False)


def train_peft(
    model: Any,
    backward: Callable[[int], None],
    step_optimizer: Callable[[], Any],
    master: Callable[[nn.Parameter], Tensor],
    *,
    masks_first: bool,
) -> Counts:
    """All steps; PEFT masks after the optimizer's step, as its documentation has it, or before."""
    counts: Counts = {}

    def mask(step: int) -> None:
        model.base_model.update_and_allocate(step)
        if step == FREEZE:
            counts["masked"] = count()

    def count() -> list[int]:
        kept = model.peft_config["default"].rank_pattern
        whole = dict(model.base_model.model.named_parameters())
        pairs = {n: (_live_copy(whole[n]), master(whole[n])) for n in kept}
        return zeros(pairs, {n: ~torch.tensor(kept[n]) for n in kept})

    for step in range(1, STEPS + 1):
        backward(step)
        if masks_first:
            mask(step)
        step_optimizer()
        if step == FREEZE + (not masks_first):
            counts["next step"] = count()
        if not masks_first:
            mask(step)
    return counts | {"end": count()}


def ours(folder: str, *, zero: dict[str, Any]) -> Counts:
    """The same with this project's model, engine and step. Collective."""
    options = {
        "adalora_target_rank": float(TARGET),
        "adalora_begin": BEGIN / STEPS,
        "adalora_final": 1 - FREEZE / STEPS,
        "adalora_every": EVERY,
    }
    ds_config = {"zero_optimization": zero}
    run = build(
        "adalora",
        options,
        folder=folder,
        steps=STEPS,
        tokens=TOKENS,
        ds_config=ds_config,
    )
    assert run.shards.sites.method.observes_until == FREEZE
    slices = {p.name: p for p in run.engine.slices if p.name.endswith("lora_lambda")}

    def whole(name: str, own: Tensor) -> Tensor:
        padded = own.new_zeros(slices[name].share)
        padded[: len(own)] = own
        return comm.all_gather_flat(padded, slices[name].numel)

    def count() -> list[int]:
        live = run.shards.live()
        with gathered(run.engine.trained[n] for n in slices):
            copies = {n: run.engine.trained[n].data.clone() for n in slices}
        masters = {n: whole(n, run.engine.master(p)) for n, p in slices.items()}
        masked = {n: ~whole(n, live[n].float()).bool() for n in slices}
        return zeros({n: (copies[n], masters[n]) for n in slices}, masked)

    when = {FREEZE: "masked", FREEZE + 1: "next step", STEPS: "end"}
    counts: Counts = {}
    for step in range(1, STEPS + 1):
        run.step(step)
        if step in when:
            counts[when[step]] = count()
    return counts


def _live_copy(parameter: nn.Parameter) -> Tensor:
    """What forward uses, whole. Collective where it is sharded."""
    # Not where it is whole already: leaving the gathering would bring its old values back.
    if parameter.numel():
        return parameter.data
    with gathered([parameter]):
        return parameter.data.clone()


def zeros(pairs: Mapping[str, tuple[Tensor, Tensor]], masked: Mapping[str, Tensor]) -> list[int]:
    """[masked lambdas, of them zero in the live copy, and in the master]."""
    counts = torch.zeros(3, dtype=torch.int64)
    for name, (copy, master) in pairs.items():
        of = masked[name]
        both = ((t.detach().flatten().cpu() == 0) & of for t in (copy, master))
        counts += torch.stack([of, *both]).sum(1)
    return counts.tolist()


def inputs(step: int) -> dict[str, Tensor]:
    """For a transformers model."""
    row = random_rows(step, 1, TOKENS)
    return {"input_ids": row.input_ids_MT, "labels": row.labels_MT}


CASES: Mapping[str, Callable[[str], Counts]] = {
    f"PEFT, {held}, masks {order} the optimizer's step": partial(
        peft_under_zero3, zero=zero, masks_first=order == "before"
    )
    for held, zero in ZERO.items()
    for order in ("after", "before")
} | {f"ours, {held}": partial(ours, zero=zero) for held, zero in ZERO.items()}


def main() -> None:
    """Every case on ranks of its own, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        on_this_rank(args.case, args.folder)
    with tempfile.TemporaryDirectory() as folder:
        save_llama(folder, width=64, inner=128, layers=2)
        rows = {"PEFT, one process without DeepSpeed": row(peft_alone(folder))}
        for case in CASES:
            on_ranks(__file__, "--case", case, "--folder", folder, ranks=RANKS)
            rows[case] = (Path(folder) / "row").read_text()
    versions = ", ".join(f"{n} {version(n)}" for n in ("peft", "deepspeed", "transformers"))
    write("peft_adalora.md", report(rows, versions))


def on_this_rank(case: str, folder: str) -> None:
    """One rank's part; rank 0 leaves the case's row beside the model."""
    quiet_others()
    comm.start()
    try:
        said = row(CASES[case](folder))
    except Exception as error:
        raised = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{raised.name} of {'/'.join(Path(raised.filename).parts[-3:])}"
        said = f"| {type(error).__name__} in {where}: {str(error).splitlines()[0]} | | |"
    if comm.rank() == 0:
        (Path(folder) / "row").write_text(said)
    comm.barrier()
    exit_process(0)


def row(counts: Counts) -> str:
    """Cells of a table."""
    texts = [f"{copy} and {master} of {of}" for of, copy, master in counts.values()]
    return f"| {' | '.join(texts)} |"


def report(rows: Mapping[str, str], versions: str) -> str:
    """The result file."""
    lines = [f"| {case} {cells}" for case, cells in rows.items()]
    return f"""\
`python benchmarks/peft_adalora.py`: {versions}; {RANKS} CPU ranks, bf16, ZeRO-3.

A random Llama, 14 linears of {PIECES} components. At step {FREEZE} of {STEPS} the choice of
{TARGET} a linear is final, and the lambdas of the others are masked. How many of these are exactly
zero: in what forward uses, and in the fp32 masters, from which the next step and a checkpoint
are made.
Adapters are sharded (persistence threshold 0), or whole on every rank, as DeepSpeed's default keeps
tensors this small. PEFT's documentation masks after the optimizer's step, and again after each that
follows; what is masked may move in between, but from zero. PEFT masks ties too, so at times more.

| | right after the mask | after the next optimizer step | after step {STEPS} |
|---|---|---|---|
{chr(10).join(lines)}"""


if __name__ == "__main__":
    main()
