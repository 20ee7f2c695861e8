"""The first and the last token of an answer: what is learned is the answer, no more and no less."""

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.data.chat import encode_answer, encode_chat, encode_prompt
from sparse_lora_dist.data.fields import Message
from tests.fixtures.data_files import assistant, jsonl, load, user
from tests.fixtures.tiny_tokenizer import MARKED, PLAIN, byte_tokenizer

# The mark stands around the content alone.
BARE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def learned(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> str:
    encoded = encode_chat(tokenizer, messages, template=BARE, train_on="response")
    ids = [i for i, t in zip(encoded.ids, encoded.is_target, strict=True) if t]
    return tokenizer.decode(ids)


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
@pytest.mark.parametrize(
    "chat",
    [
        [assistant("A"), user("b")],  # a turn of one token, and it is the first
        [user("a"), assistant("cafe\u0301"), user("b")],  # Qwen's NFC joins the last two letters
        [user("a"), assistant("yes \U0001f600"), user("b")],  # four bytes, one letter
        [user("a"), assistant(" b "), user("c"), assistant("d")],
    ],
)
def test_marks_around_the_content_alone(
    chat: list[Message], normalizer: normalizers.Normalizer | None
) -> None:
    """huggingface/transformers#47325"""
    tokenizer = byte_tokenizer()
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    wanted = "".join(m["content"] for m in chat if m["role"] == "assistant")
    if normalizer is not None:
        wanted = normalizer.normalize_str(wanted)
    assert learned(tokenizer, chat) == wanted


def llama_like(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before each text, as those of Llama 2 and Mistral do."""
    letters = ["▁", *"Q:2+=4bok\nshelf"]
    words = [*dict.fromkeys(letters), *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize(
    ("prompt", "response", "tokens"),
    [
        ("Q: 2+2=", "4", ["4"]),
        ("book\n", "shelf", ["s", "h", "e", "l", "f"]),
        ("Q:", " 4", ["▁", "4"]),
        ("Q: 2", "4", ["4"]),  # "24" is one token, but the prompt alone ends with "2"
    ],
)
def test_a_response_follows_its_prompt_as_it_is(
    prompt: str, response: str, tokens: list[str]
) -> None:
    """lm-sys/FastChat PR #3006, huggingface/trl#6105"""
    tokenizer = llama_like(("2", "4"))
    chat = [user(prompt), assistant(response)]
    encoded = encode_chat(tokenizer, chat, template=None, train_on="response")
    found = [i for i, t in zip(encoded.ids, encoded.is_target, strict=True) if t]
    assert tokenizer.convert_ids_to_tokens(found) == tokens
    before = encode_prompt(tokenizer, chat[:1], template=None)
    assert encoded.ids == before + found
    scored = encode_answer(tokenizer, chat[:1], response, before=before, template=None)
    assert scored.ids == encoded.ids


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("own_cache")
def test_turns_of_the_model_under_another_role_are_named(tmp_path):
    """hiyouga/LlamaFactory#5866: function_call and observation"""
    call = {"role": "function_call", "content": "f()"}
    seen = {"role": "observation", "content": "1"}
    rows = [{"messages": [user("a"), call, seen, assistant("b")]}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    (note,) = load(path, byte_tokenizer(template=PLAIN)).reading.notes
    assert note.startswith("messages of the role function_call are rendered but not learned")
    assert load(path, byte_tokenizer(template=PLAIN), train_on="all").reading.notes == ()
    assert load(path, byte_tokenizer(template=MARKED)).reading.notes == ()  # its marks decide


@pytest.mark.usefixtures("own_cache")
def test_a_template_that_writes_the_date_is_pointed_out(tmp_path):
    """sgl-project/sglang#3296: another day's rows are other rows"""
    template = "{{ strftime_now('%d') }}" + PLAIN
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [user("a"), assistant("b")]}])
    (note,) = load(path, byte_tokenizer(template=template)).reading.notes
    assert "writes the date into each row (strftime_now)" in note
