"""Tokens: which there are, which of them are learned, and what is left out."""

import json
from itertools import pairwise

import pytest

from sparse_lora_dist.data import load_documents
from sparse_lora_dist.errors import UserError
from tests.fixtures.tiny_tokenizer import FORGETFUL, MARKED, PLAIN, byte_tokenizer

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": " yo "},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def load(tmp_path):
    def _load(records, tokenizer, **options):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        defaults = {
            "text_field": "text",
            "prompt_field": "prompt",
            "response_field": "response",
            "chat_template": None,
            "train_on": "response",
            "sequence_length": 128,
            "max_samples": None,
        }
        return load_documents(str(path), tokenizer, **{**defaults, **options})

    return _load


def learned(document, tokenizer):
    """The target tokens as text, runs of them apart; a label is always its own token."""
    runs, last = [], -2
    for i, label in enumerate(document.labels.tolist()):
        if label == -100:
            continue
        assert label == document.input_ids[i]
        runs += [[]] if i != last + 1 else []
        runs[-1].append(label)
        last = i
    return [tokenizer.decode(run) for run in runs]


def test_a_pair_without_template_is_joined_and_ended(load):
    tokenizer = byte_tokenizer()
    (document,) = load([{"prompt": "a+b=", "response": "c"}], tokenizer)
    assert tokenizer.decode(document.input_ids) == "a+b=c</s>"
    assert learned(document, tokenizer) == ["c</s>"]


def test_bos_and_eos_stand_once(load):
    tokenizer = byte_tokenizer(adds_bos=True)
    pair = {"prompt": "<s>a", "response": "b</s>"}
    for record in (pair, {"prompt": "a", "response": "b"}):
        (document,) = load([record], tokenizer)
        assert tokenizer.decode(document.input_ids) == "<s>ab</s>"
        assert learned(document, tokenizer) == ["b</s>"]
    (document,) = load([pair], tokenizer, chat_template=PLAIN)
    assert tokenizer.decode(document.input_ids).count("<s>") == 2, "the prompt's own and one more"
    (document,) = load([{"prompt": "a", "response": "b"}], tokenizer, chat_template=PLAIN)
    assert tokenizer.decode(document.input_ids) == "<s><|user|>a<|end|>\n<|assistant|>b<|end|>\n"


def test_a_pair_is_a_chat_where_there_is_a_template(load):
    tokenizer = byte_tokenizer(template=MARKED)
    (document,) = load([{"q": "a", "a": "b"}], tokenizer, prompt_field="q", response_field="a")
    assert tokenizer.decode(document.input_ids) == "<s><|user|>a<|end|>\n<|assistant|>b<|end|>\n"
    assert learned(document, tokenizer) == ["b<|end|>"]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_every_assistant_turn_is_learned_by_marks_or_by_prefixes(load, trim_offsets):
    for template, after in ((MARKED, ""), (PLAIN, "\n")):
        tokenizer = byte_tokenizer(template=template, trim_offsets=trim_offsets)
        (document,) = load([{"messages": CHAT}], tokenizer)
        want = [f" yo <|end|>{after}", f"so long<|end|>{after}"]
        assert learned(document, tokenizer) == want


def test_special_tokens_inside_a_message_do_not_move_the_spans(load):
    chat = [
        {"role": "user", "content": "say <|assistant|> and <|end|>"},
        {"role": "assistant", "content": "<|user|>x<|end|>y"},
    ]
    for template, after in ((MARKED, ""), (PLAIN, "\n")):
        tokenizer = byte_tokenizer(template=template)
        (document,) = load([{"messages": chat}], tokenizer)
        assert learned(document, tokenizer) == [f"<|user|>x<|end|>y<|end|>{after}"]


def test_train_on_all_learns_everything_but_the_first_token(load):
    for template in (MARKED, PLAIN, FORGETFUL):
        tokenizer = byte_tokenizer(template=template)
        (document,) = load([{"messages": CHAT}], tokenizer, train_on="all")
        assert document.labels[0] == -100
        assert document.labels[1:].tolist() == document.input_ids[1:].tolist()


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_line(load):
    tokenizer = byte_tokenizer(template=FORGETFUL)
    assert len(load([{"messages": CHAT[:3]}], tokenizer)) == 1
    message = r"a\.jsonl:2: .*message 3 .*not the first tokens.*--train_on all"
    with pytest.raises(UserError, match=message):
        load([{"messages": chat} for chat in (CHAT[:3], CHAT)], tokenizer)


def test_a_chat_that_the_template_refuses_is_named(load):
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: The chat template refuses this chat: roles must"
    ):
        load([{"messages": CHAT}], byte_tokenizer(), chat_template=refusing)


def test_chat_template_is_a_file_or_the_text_and_needed_for_chats(load, tmp_path):
    (tmp_path / "chat.jinja").write_text(MARKED)
    tokenizer = byte_tokenizer()
    for given in (MARKED, str(tmp_path / "chat.jinja")):
        (document,) = load([{"messages": CHAT}], tokenizer, chat_template=given)
        assert learned(document, tokenizer) == [" yo <|end|>", "so long<|end|>"]
    with pytest.raises(UserError, match="has no chat template.*--chat_template"):
        load([{"messages": CHAT}], tokenizer)
    with pytest.raises(UserError, match=r"--chat_template gone\.jinja is neither a file"):
        load([{"messages": CHAT}], tokenizer, chat_template="gone.jinja")


@pytest.mark.parametrize("num_letters", [1, 6, 7, 8, 9, 14, 15, 16, 200])
def test_plain_text_is_cut_and_every_token_but_the_first_learned_once(load, num_letters):
    tokenizer = byte_tokenizer()
    text = "".join(chr(97 + i % 26) for i in range(num_letters))
    documents = load([{"text": text}], tokenizer, sequence_length=8)
    assert [len(d.input_ids) for d in documents][:-1] == [8] * (len(documents) - 1)
    assert max(documents.lengths) <= 8
    learned_text = "".join(tokenizer.decode(d.labels[1:]) for d in documents)
    assert text[0] + learned_text == text + "</s>"
    assert all(a.input_ids[-1] == b.input_ids[0] for a, b in pairwise(documents))


def test_what_is_too_long_or_teaches_nothing_is_left_out_and_reported(load):
    tokenizer = byte_tokenizer(template=MARKED)
    records = [
        {"messages": CHAT[:3]},
        {"messages": [{"role": "user", "content": "x" * 900}, CHAT[2]]},
        {"messages": CHAT[:2]},
    ]
    documents = load(records, tokenizer)
    assert (len(documents), documents.too_long, documents.no_target) == (1, 1, 1)
    assert documents.longest == 911  # 900 and <s> <|user|> <|end|> \n <|assistant|> yo+2 <|end|> \n
    report = documents.report()
    assert "\n" not in report
    assert report.startswith("1 documents, 23 tokens, 5 targets; 1 left out, longer than")
    assert "--sequence_length 128 (raise it to 911, the longest" in report
    assert report.endswith("1 left out, without a target token")
    with pytest.raises(UserError, match=r"no document to train on.*--sequence_length 128"):
        load(records[1:], tokenizer)


def test_empty_texts_are_left_out(load):
    documents = load([{"text": ""}, {"text": " \n"}, {"text": "a"}], byte_tokenizer())
    assert (len(documents), documents.no_target) == (1, 2)
