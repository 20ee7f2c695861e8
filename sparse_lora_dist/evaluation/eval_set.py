"""Reads and tokenises the evaluation data, once for all models that are compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.data import Documents, be_quiet
from sparse_lora_dist.data.chat import end_of_turn
from sparse_lora_dist.data.fields import ExampleError, find_template
from sparse_lora_dist.data.fingerprint import hash_of_examples
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import counted, print_line
from sparse_lora_dist.distributed.phases import fail_together, first_on_its_node
from sparse_lora_dist.errors import as_user_error
from sparse_lora_dist.evaluation.answer_frame import AnswerFrame, find_frame
from sparse_lora_dist.evaluation.eval_metrics import METRICS
from sparse_lora_dist.evaluation.eval_options import EvalConfig, EvalRequest
from sparse_lora_dist.evaluation.examples import Table
from sparse_lora_dist.evaluation.questions import Encoder, GeneratedQuestion
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.model.prompting import generation_settings, not_greedy
from sparse_lora_dist.training.feed import (
    hashes,
    identity_of_tokenizer,
    open_tokenizer,
    print_reading,
    same_on_all_nodes,
)
from sparse_lora_dist.training.fits import check_ids, check_positions, check_rope

RESULT_OPTIONS = (
    *("model", "revision", "quantization", "double_quant", "precision", "attn_implementation"),
    *("eval_data", "text_field", "prompt_field", "response_field", "chat_template", "train_on"),
    "sequence_length",
)
"""Options that the results depend on. The file of --output records their values."""


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """Examples and settings of an evaluation, the same for every adapter."""

    config: Config
    """Options that evaluation shares with training."""
    own: EvalConfig
    """Options that only evaluation has."""
    engine_config: dict[str, Any]
    """The DeepSpeed configuration."""
    tokenizer: Any
    """The tokenizer of the base."""
    stop_ids: set[int]
    """Token ids at which the chat template ends a turn; empty if nothing is generated."""
    frame: AnswerFrame
    """What the chat template puts around an answer."""
    items: Mapping[str, Any]
    """Metric name -> its tokenised examples, as ``Metric.items`` returns them."""

    def settings(self) -> dict[str, Any]:
        """Return the settings that the results depend on, for the file of --output.

        Settings that do not change the results, e.g. the number of ranks, are left out.

        Returns:
            Option name -> value, and "left_out": {"loss": {"too_long": number of examples longer
            than --sequence_length, "no_target": number of examples without a token to score}}.
        """
        flat = self.config.as_flat_dict() | {"eval_data": self.config.data.eval_data or "default"}
        left_out = {
            name: {"too_long": found.too_long, "no_target": found.no_target}
            for name, found in self.items.items()
            if isinstance(found, Documents)
        }
        return (
            {name: flat[name] for name in RESULT_OPTIONS}
            | {"metrics": list(self.own.metrics), "left_out": left_out}
            | {name: getattr(self.own, name) for name in ("batch_size", "max_new_tokens", "limit")}
        )


def open_eval_set(
    request: EvalRequest, config: Config, model: Model, engine_config: dict[str, Any]
) -> EvalSet:
    """Read and tokenise the examples of every metric, and print their numbers. Collective.

    Args:
        request: The command line's options.
        config: Options that evaluation shares with training, as ``evaluate`` has changed them: no
            gradient checkpointing, adapter options at their defaults. ``request.config`` is not
            used.
        model: An opened model, for its tokenizer's folder and its number of positions.
        engine_config: The DeepSpeed configuration.

    Returns:
        The tokenised examples, the same on every rank.

    Raises:
        UserError: An example is wrong or too long. Raised on every rank.
    """
    if comm.rank() > 0:
        be_quiet()
    source = as_user_error(f"--eval_data {request.source}", "Check the data, or convert them.")
    with fail_together("reading the data"), first_on_its_node(), source:
        tokenizer = open_tokenizer(config, model)
        table = Table.read(request.source, config.data, request.own.limit)
        content = None
        if hashes():
            content = replace(
                identity_of_tokenizer(config, tokenizer), eval_data=hash_of_examples(table.examples)
            )
        template = find_template(tokenizer, config.data.chat_template, has_tools=table.has_tools)
        frame = _frame(tokenizer, template)
        encoder = Encoder(tokenizer=tokenizer, template=template, data=config.data, frame=frame)
        items = {
            name: METRICS[name].items(encoder, table, request.own.limit)
            for name in request.own.metrics
        }
        generates = [name for name in items if METRICS[name].generates]
        stop_ids = _stop_ids(tokenizer, template) if generates else set()
        prompts = [len(question.prompt) for name in generates for question in items[name]]
        longest = max(prompts) + request.own.max_new_tokens if prompts else 0
        by_row: Any = {"alone": request.own.batch_size == 1, "change": "--batch_size 1"}
        for name, found in items.items():
            flag, scored = f"--eval_data (metric {name})", _token_ids(found)
            check_ids(model, tokenizer, scored, flag)
            check_positions(model, _longest(scored), flag)
            check_rope(model, _longest(scored), flag, **by_row)
        flag, new_tokens = "--eval_data with --max_new_tokens", request.own.max_new_tokens
        check_positions(model, longest, flag, new_tokens=new_tokens if prompts else 0)
        check_rope(model, longest, flag, **by_row)
    same_on_all_nodes(content)
    if generates and (left := not_greedy(generation_settings(model.folder, model.module))):
        print_line("note", left)
    for name, found in items.items():
        counts = found.report() if isinstance(found, Documents) else counted(len(found), "question")
        print_line(name, counts)
        if isinstance(found, Documents):
            print_reading(found.reading, notes_of="--eval_data")
    if any(not isinstance(found, Documents) for found in items.values()):
        asked = table.reading(template, config.data.chat_template, tokenizer)
        print_reading(asked, notes_of="--eval_data")
    return EvalSet(
        config=config,
        own=request.own,
        engine_config=engine_config,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        frame=frame,
        items=items,
    )


def _stop_ids(tokenizer: Any, template: str | None) -> set[int]:
    try:
        return end_of_turn(tokenizer, template=template)
    except ExampleError as error:
        print_line(
            "note",
            "generation stops at the end-of-sequence token alone: what ends an answer in the chat "
            f"template is not known, since it refuses a chat of one question. {error}",
        )
        return set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}


def _frame(tokenizer: Any, template: str | None) -> AnswerFrame:
    try:
        return find_frame(tokenizer, template)
    except ExampleError:  # the template refuses a chat of one question and its answer
        return AnswerFrame()


def _token_ids(items: Any) -> Documents | list[Sequence[int]]:
    """Return the token ids of the examples of a metric: documents, or a list for each prompt or
    choice."""
    if isinstance(items, Documents):
        return items
    return [
        ids
        for item in items
        for ids in (
            [item.prompt]
            if isinstance(item, GeneratedQuestion)
            else [document.input_ids.tolist() for document in item.documents]
        )
    ]


def _longest(scored: Documents | list[Sequence[int]]) -> int:
    if isinstance(scored, Documents):
        return int(scored.lengths.max())
    return max(map(len, scored), default=0)
