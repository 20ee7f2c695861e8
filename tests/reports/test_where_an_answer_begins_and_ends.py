"""The first and the last token of an answer: what is learned is the answer, no more and no less."""

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data.chat import encode_answer, encode_chat, encode_prompt, end_of_turn
from sparse_lora_dist.data.fields import Message, find_template, unasked_prompt
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.answer_frame import find_frame
from sparse_lora_dist.evaluation.questions import Encoder
from tests.fixtures.data_files import assistant, jsonl, load, pairs, texts, user
from tests.fixtures.data_files import learned as targets
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


HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}",
    "{{ '<|user|>assistant\n' }}",
)
ASKS = {
    "Llama 3": (LLAMA_3, "{{ '" + HEADER + "' }}"),
    "Llama 3.1": (
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday<|eot_id|>' }}\n"
        "{%- for m in messages %}\n    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>"
        "\n\n' + m.content + '<|eot_id|>' }}\n    {%- for c in m.tool_calls or [] %}{{ c }}"
        "{% endfor %}\n{%- endfor %}\n",
        "{{- '" + HEADER + "' }}",
    ),
    "ChatML": CHATML,
    "marked": (MARKED.partition("{% if add")[0], "<|assistant|>"),
    "Vicuna": (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}"
        "ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}",
        "ASSISTANT: ",
    ),
}
"""A loop over messages, and a generation prompt behind it."""
IF = "{%- if add_generation_prompt %}"


def with_headers(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(template=template)
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": headers})
    return tokenizer


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize("name", ASKS)
def test_a_template_that_asks_unasked_teaches_what_one_that_waits_does(tmp_path, name, train_on):
    """meta-llama/llama3#29, huggingface/transformers#32252"""
    loop, prompt = ASKS[name]
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    chats = [{"messages": turns}, {"messages": turns[:3]}]
    for k, rows in enumerate([pairs("4", "an assistant"), chats]):
        path, found = jsonl(tmp_path / f"{k}.jsonl", rows), []
        for template in (loop + prompt, loop + IF + prompt + "{% endif %}"):
            tokenizer = with_headers(template)
            documents = load(path, tokenizer, train_on=train_on)
            ends = sorted(documents.ends), documents.reading.answer_ends
            found.append((texts(documents, tokenizer), targets(documents, tokenizer), ends))
            notes = [n for n in documents.reading.notes if "after every chat" in n]
            assert len(notes) == (template == loop + prompt)
        assert found[0] == found[1]
        whole = [
            tokenizer.apply_chat_template(chat, tokenize=False)
            for chat in ([user("?"), assistant("4")], [user("?"), assistant("an assistant")])
        ]
        assert k or found[0][0] == whole
    end = "<|eot_id|>" if "Llama" in name else "</s>" if name == "Vicuna" else "<|end|>"
    rest = "\n" if name == "ChatML" else ""
    if train_on == "response":
        assert found[0][1] == [f"b{end}{rest}d{end}{rest}", f"b{end}{rest}"]
    assert found[0][2] == (sorted({end, "</s>"}), (end,))


def test_a_template_that_asks_for_more_if_it_is_asked():
    """Command A writes the header of the next turn always, and <|resp|> only if it is asked."""
    loop = (
        "{% for m in messages %}<|start|>{{ m.role }}|{% if m.role == 'assistant' %}<|resp|>"
        "{% endif %}{{ m.content }}<|end|>{% endfor %}"
    )
    prompt, more = "<|start|>assistant|", "{% if add_generation_prompt %}<|resp|>{% endif %}"
    tokenizer = byte_tokenizer(template=loop + prompt + more)
    special = ["<|start|>", "<|resp|>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    assert unasked_prompt(tokenizer, loop + prompt + more) == prompt
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}
    assert end_of_turn(tokenizer, template=loop + prompt + more) == ends
    chat = [user("Q"), assistant("A")]
    encoded = encode_chat(tokenizer, chat, template=loop + prompt + more, train_on="response")
    ids = [i for i, t in zip(encoded.ids, encoded.is_target, strict=True) if t]
    assert tokenizer.decode(ids).removesuffix("</s>") == "A<|end|>"
    asked = encode_prompt(tokenizer, chat[:1], template=loop + prompt + more)
    assert tokenizer.decode(asked).endswith("<|start|>assistant|<|resp|>")


@pytest.mark.parametrize("name", ASKS)
def test_an_answer_is_graded_and_ends_where_a_template_asks_unasked(name):
    loop, prompt = ASKS[name]
    tokenizer = with_headers(loop + prompt)
    waits = loop + IF + prompt + "{% endif %}"
    frame = find_frame(tokenizer, loop + prompt)
    assert frame == find_frame(tokenizer, waits)
    assert frame.answer_in("voice assistant") == "voice assistant"
    assert end_of_turn(tokenizer, template=loop + prompt) == end_of_turn(tokenizer, template=waits)
    data = DataConfig()
    found = [
        Encoder(tokenizer=tokenizer, template=t, data=data, frame=frame).with_answers(
            [user("?")], ["x", "y"]
        )
        for t in (loop + prompt, waits)
    ]
    for one, other in zip(*found, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()


@pytest.mark.parametrize("number", [1, 2])
def test_a_prompt_written_unasked_inside_the_loop_is_refused(number):
    loop, prompt = ASKS[["Llama 3", "ChatML"][number - 1]]
    template = loop.replace("{% endfor", "{% if loop.last %}" + prompt + "{% endif %}{% endfor")
    with pytest.raises(UserError, match=r"asks for an answer, .* also after the last answer"):
        find_template(with_headers(template), template)
    waits = template.replace("loop.last", "loop.last and add_generation_prompt")
    assert find_template(with_headers(waits), waits) == waits


NEVER = {
    "asks when it is asked": PLAIN,
    "marks": MARKED,
    "asks nobody": CHATML[0],
    "Llama 2": "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
    "an end between messages and at the end": "{% for m in messages %}{% if not loop.first %}</s>"
    "{% endif %}{{ m.content }}{% endfor %}</s>",
    "an end after the last message alone": "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if loop.last %}</s>{% endif %}\n{% endfor %}",
    "another end after the last answer": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|system|>{% else %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "thoughts of the last answer": "{% for m in messages %}<|{{ m.role }}|>{% if m.role == "
    "'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "asks after a question alone": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endfor %}{% if messages[-1].role == 'user' %}<|assistant|>{% endif %}",
    "no more than lines": "{% for m in messages %}{{ m.content }}\n{% endfor %}\n\n",
}


@pytest.mark.parametrize("name", NEVER)
def test_a_template_that_asks_only_when_asked_stays_as_it_is(name):
    template = NEVER[name]
    tokenizer = byte_tokenizer(template=template)
    assert find_template(tokenizer, None) == template
    assert unasked_prompt(tokenizer, template) == ""
    chat = [user("a"), assistant("b")]
    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert encode_chat(tokenizer, chat, template=template, train_on="all").ids == whole


def of_words(words: str, *, special: bool, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words and an end of turn that is added later."""
    names = ["<pad>", "</s>", "<unk>", *words.split()]
    vocab = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_tokens(["<end>"], special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


TURNS = "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
DEMANDS = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    ("words", "special", "template"),
    [
        ("MKV ACD", True, TURNS),  # neither "a" nor "b" has a token
        ("a b", False, TURNS),  # as axolotl's option tokens adds it
        ("a b", True, DEMANDS + TURNS),
    ],
    ids=["amino acids", "not special", "system prompt"],
)
def test_the_end_of_an_answer_is_found_in_any_vocabulary_and_template(
    tmp_path, words, special, template
):
    """The model learned it, and exports and evaluations did not stop there."""
    tokenizer = of_words(words, special=special, template=template)
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert end_of_turn(tokenizer, template=template) == {1, end}
    answer = words.split()[0]
    chat = [{"role": "system", "content": "s"}, user(answer), assistant(answer)]
    documents = load(jsonl(tmp_path / "a.jsonl", [{"messages": chat}]), tokenizer=tokenizer)
    assert documents.ends == {"</s>": 1, "<end>": end}
    assert documents.reading.answer_ends == ("<end>",)
