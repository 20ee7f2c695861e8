"""What a base says about its answers and its tokenizer is read as it stands, or refused by name."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.model.prompting import (
    CHANGING,
    GENERATION,
    end_ids,
    generation_settings,
    not_greedy,
    with_ends,
)
from sparse_lora_dist.runtime import entry_point
from sparse_lora_dist.training import feed
from sparse_lora_dist.training.fits import check_first_loss

MODULE: Any = SimpleNamespace(generation_config=None, can_generate=lambda: True)


def settings(folder: Path, text: str) -> dict[str, Any]:
    (folder / GENERATION).write_text(text)
    return generation_settings(folder, MODULE)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "2", '{"eos_token_id": 2, "eos_token_id": 3}'),
        *(json.dumps({"eos_token_id": ids}) for ids in ("2", 2.0, ["</s>"], [[2]], {}, True)),
    ],
)
def test_settings_that_say_no_tokens_are_refused_with_the_file(tmp_path: Path, text: str) -> None:
    """Read as if they named no token, answers would never stop."""
    with pytest.raises(UserError, match=rf"{GENERATION} cannot be used: .*Correct it, or remove"):
        settings(tmp_path, text)


@pytest.mark.parametrize(("ids", "ends"), [(None, []), (2, [2]), ([2, 3], [2, 3])])
def test_settings_of_tokens_are_read(tmp_path: Path, ids: Any, ends: list[int]) -> None:
    assert end_ids(settings(tmp_path, json.dumps({"eos_token_id": ids}))) == ends


def test_an_end_that_is_listed_twice_is_exported_once() -> None:
    assert with_ends({"eos_token_id": [2, 2]}, [2]) == {"eos_token_id": 2}
    assert with_ends({"eos_token_id": [2, 2]}, [3]) == {"eos_token_id": [2, 3]}


NO_OTHER_ANSWERS = """
    max_length max_new_tokens max_time do_sample temperature top_k top_p min_p top_h typical_p
    epsilon_cutoff eta_cutoff early_stopping length_penalty renormalize_logits remove_invalid_values
    num_return_sequences pad_token_id bos_token_id eos_token_id decoder_start_token_id
    use_cache cache_implementation cache_config max_cache_len low_memory prefill_chunk_size
    compile_config disable_compile continuous_batching_config
    output_attentions output_hidden_states output_scores output_logits return_dict_in_generate
    use_mtp is_assistant num_assistant_tokens num_assistant_tokens_schedule speculation_type
    assistant_confidence_threshold assistant_early_exit assistant_lookbehind
    assistant_ensemble_weight target_lookbehind prompt_lookup_num_tokens max_matching_ngram_size
    _from_model_config transformers_version
""".split()
"""Limits, sampling, beams (which num_beams says), caches, outputs and speculation."""


def test_each_setting_of_transformers_is_known_to_change_greedy_answers_or_not() -> None:
    """A new one of transformers is to be put into one of the two lists."""
    known = {*CHANGING, *NO_OTHER_ANSWERS}
    assert set(vars(GenerationConfig())) - known == set()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder_repetition_penalty", 1.2),
        ("watermarking_config", {"bias": 2.0, "greenlist_ratio": 0.25}),
        ("token_healing", True),
        ("dola_layers", "high"),
    ],
)
def test_a_setting_that_changes_greedy_answers_is_named(name: str, value: Any) -> None:
    assert f"without the base's settings {name} " in not_greedy({name: value})
    usual = {"encoder_repetition_penalty": 1.0, "token_healing": False, "num_beam_groups": 1}
    assert not_greedy(usual) == ""


def test_words_at_which_transformers_would_stop_are_named() -> None:
    assert "stop_strings ['END']" in not_greedy({"stop_strings": ["END"]})


def test_a_panic_of_a_library_in_rust_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class PanicException(BaseException):
        """As pyo3's, which cannot be made here."""

    def panics(_: Any) -> None:
        raise PanicException("no entry found for key")

    monkeypatch.setattr(entry_point, "exit_process", sys.exit)
    config = SimpleNamespace(run=SimpleNamespace(debug=False))
    with pytest.raises(SystemExit) as end:
        entry_point.run_program([], lambda _: config, panics)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "no entry found for key" in said and "Traceback" not in said


def test_a_sentencepiece_model_names_the_package(tmp_path: Path) -> None:
    """transformers names tiktoken."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    config: Any = SimpleNamespace(model=SimpleNamespace(trust_remote_code=False))
    model: Any = SimpleNamespace(folder=tmp_path)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        feed.open_tokenizer(config, model)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_run_over_weights_that_are_no_numbers_does_not_begin(loss: float) -> None:
    check_first_loss(9.7)
    with pytest.raises(UserError, match="--model or --init_adapter are damaged"):
        check_first_loss(loss)


def test_an_adapter_that_is_no_numbers_is_not_exported(tmp_path: Path) -> None:
    slices = SimpleNamespace(entries=lambda *_: torch.tensor([1.0, float("nan")]))
    trained: Any = SimpleNamespace(manifest={"tensors": {"a": [2]}}, slices=slices, path=tmp_path)
    with pytest.raises(UserError, match=f"a of {tmp_path} holds values that are not finite"):
        Trained.tensor(trained, "a")
