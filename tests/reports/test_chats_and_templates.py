"""Users had chats with tools, and templates of many kinds; and what became of them."""

import datasets
import pytest

from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data.fields import find_template
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.examples import Table
from sparse_lora_dist.evaluation.questions import Encoder, exact
from tests.fixtures.data_files import assistant, jsonl, learned, load, pairs, texts, user
from tests.fixtures.tiny_tokenizer import MARKED, PLAIN, byte_tokenizer

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
WITH_TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHOWN = '<|system|>[{"type": "function", "function": {"name": "f", "parameters": {}}}]<|end|>'
CHAT = [user("a"), assistant("b")]


pytestmark = pytest.mark.usefixtures("own_cache")


def rendered(path, template, **options):
    tokenizer = byte_tokenizer(template=template)
    return texts(load(path, tokenizer, **options), tokenizer)


@pytest.mark.parametrize(
    "tools", [TOOLS, '[{"type": "function", "function": {"name": "f", "parameters": {}}}]']
)
def test_the_tools_of_a_chat_are_rendered(tmp_path, tools):
    """hiyouga/LlamaFactory#4152, huggingface/trl PR #3597, #6259"""
    rows = [{"messages": CHAT, "tools": tools}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert rendered(path, WITH_TOOLS) == [SHOWN + "<|user|>a<|end|><|assistant|>b<|end|>"]
    tokenizer = byte_tokenizer(template=WITH_TOOLS)
    documents = load(path, tokenizer)
    assert learned(documents, tokenizer) == ["b<|end|>"]
    assert documents.reading.columns == ("messages", "tools")


def test_a_prompt_with_tools_and_a_chat_without_them(tmp_path):
    rows = [pairs("b")[0] | {"tools": TOOLS}, pairs("c")[0] | {"tools": None}, pairs("d")[0]]
    found = rendered(jsonl(tmp_path / "a.jsonl", rows), WITH_TOOLS)
    assert [text.startswith(SHOWN) for text in found] == [True, False, False]


def test_tools_that_the_template_does_not_render_are_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT, "tools": TOOLS}])
    reading = load(path, byte_tokenizer(template=PLAIN)).reading
    assert reading.unread_columns == ("tools",)
    rows = [{"messages": CHAT, "tools": "f(x)"}]
    with pytest.raises(UserError, match=r"b\.jsonl:1: 'tools' is text, but not valid JSON"):
        rendered(jsonl(tmp_path / "b.jsonl", rows), WITH_TOOLS)


def test_a_question_is_asked_with_its_tools(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT, "tools": TOOLS}])
    data = DataConfig()
    table, tokenizer = Table.read(str(path), data, None), byte_tokenizer(template=WITH_TOOLS)
    encoder = Encoder(tokenizer=tokenizer, template=WITH_TOOLS, data=data)
    (question,) = table.map(lambda table, record: exact(encoder, table, record))
    trained = load(path, tokenizer)[0].input_ids
    assert question.prompt == list(trained[: len(question.prompt)])
    assert table.reading(WITH_TOOLS, None, tokenizer).columns == ("messages", "tools")


def test_a_prompt_field_that_was_given_is_asked_too(tmp_path):
    row = {"messages": [user("old"), assistant("red")], "question": "q", "answer": "a"}
    path = jsonl(tmp_path / "a.jsonl", [row])
    data = DataConfig(prompt_field="question", response_field="answer")
    table = Table.read(str(path), data, None)
    assert table.map(lambda t, r: (t.messages(r), t.reference(r))) == [([user("q")], "a")]


def test_nulls_that_parquet_adds_to_tool_calls_are_not_learned(tmp_path):
    calls = [
        [{"function": {"name": "f", "arguments": {"x": 1}}}],
        [{"function": {"name": "g", "arguments": {"y": 2}}}],
    ]
    rows = [{"messages": [user("a"), assistant("", tool_calls=call)]} for call in calls]
    path = jsonl(tmp_path / "a.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    right = rendered(path, WITH_TOOLS)
    assert '{"name": "f", "arguments": {"x": 1}}' in right[0]
    assert rendered(tmp_path / "a.parquet", WITH_TOOLS) == right


def test_content_that_is_null_beside_tool_calls_says_what_to_give(tmp_path):
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [user("a"), message]}])
    with pytest.raises(UserError, match=r'null beside tool_calls. It must be text. Give it "".'):
        rendered(path, WITH_TOOLS)


def test_options_of_the_template_in_the_data_are_refused(tmp_path):
    rows = [{"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match="has a column 'chat_template_kwargs', which is not supp"):
        rendered(path, WITH_TOOLS)
    with pytest.raises(UserError, match="--eval_data .* 'chat_template_kwargs'"):
        Table.read(str(path), DataConfig(), None)


NO_END = {
    "the next role ends a turn": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "marks around the content alone": (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "no end": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}


@pytest.mark.parametrize("case", NO_END)
def test_a_template_with_which_the_model_never_learns_to_stop_is_pointed_out(tmp_path, case):
    """huggingface/trl PR #5988, #976, #734"""
    reading = load(
        jsonl(tmp_path / "a.jsonl", pairs("b", "c")), byte_tokenizer(template=NO_END[case])
    ).reading
    (note,) = reading.notes
    assert note.startswith("no token that ends an answer is learned (")
    assert "an answer ends with: none" in reading.report()


@pytest.mark.parametrize("template", [None, MARKED, PLAIN])
def test_a_template_that_ends_answers_is_not_pointed_out(tmp_path, template):
    reading = load(
        jsonl(tmp_path / "a.jsonl", pairs("b")), byte_tokenizer(template=template)
    ).reading
    assert reading.notes == ()
    end = "</s>" if template is None else "<|end|>"
    assert f"an answer ends with: {end}" in reading.report()


def test_named_templates_without_a_default_are_named(tmp_path):
    """axolotl PR #2398"""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"rag": PLAIN, "tool_use": WITH_TOOLS}
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(UserError, match="several chat templates, called rag, tool_use, and none"):
        load(path, tokenizer)
    tokenizer.chat_template = {"default": PLAIN, "tool_use": WITH_TOOLS}
    assert load(path, tokenizer).reading.template == "the tokenizer's own, called default"
    path = jsonl(tmp_path / "b.jsonl", [{"messages": CHAT, "tools": TOOLS}])
    documents = load(path, tokenizer)
    assert documents.reading.template == "the tokenizer's own, called tool_use"
    assert texts(documents)[0].startswith(SHOWN)


WRONG = {
    "a type error": ("{% for m in messages %}{{ m.role + 1 }}{% endfor %}", "TypeError: "),
    "a division": ("{{ 1 / 0 }}", "ZeroDivisionError: "),
    "an include": ("{% include 'x' %}", "TypeError: "),
    "a recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
    "its own refusal": ("{{ raise_exception('no chats') }}", "no chats"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_template_that_fails_is_one_sentence_with_the_line_of_the_chat(tmp_path, case):
    template, message = WRONG[case]
    with pytest.raises(UserError, match=rf"a\.jsonl:1: The chat template refuses .*: {message}"):
        rendered(jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), template)


def test_a_template_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(UserError, match=r"--chat_template .*t\.jinja cannot be read: .*utf-8"):
        find_template(byte_tokenizer(), str(tmp_path / "t.jinja"))
    (tmp_path / "u.jinja").write_text(PLAIN)
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    reading = load(path, chat_template=str(tmp_path / "u.jinja")).reading
    assert reading.template == str(tmp_path / "u.jinja")


THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1] }}{% else %} {{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_that_leaves_out_what_the_model_thinks_is_pointed_out(tmp_path):
    """huggingface/trl#6363, THUDM/slime#330"""
    thinking, plain = pairs("<think>hm</think>b", "b"), pairs("b", "b \n c")
    (note,) = notes_of(tmp_path, thinking, THINKS)
    assert (
        "leaves out a part, such as what stands before </think>" in note
        and "in 1 of the first examples" in note
    )
    assert notes_of(tmp_path, plain, THINKS) == []
    assert notes_of(tmp_path, thinking, PLAIN) == []
    # What an earlier turn thought is left out on purpose.
    turns = [user("a"), assistant("<think>hm</think>b"), user("c"), assistant("d")]
    assert notes_of(tmp_path, [{"messages": turns}], THINKS) == []


@pytest.mark.parametrize("changes", ["e", "tojson", "upper"])
def test_a_template_that_changes_answers_is_not_said_to_hide_them(tmp_path, changes):
    """Rendered by jinja: what it writes is learned, and the note says so."""
    template = PLAIN.replace("m.content", f"m.content | {changes}")
    (note,) = notes_of(tmp_path, [{"messages": [user("A"), assistant('a "b" <c>')]}], template)
    assert "or changes it, as |e and |tojson do, in 1 of" in note and "does not learn" not in note
    assert "The model learns what the template writes" in note
    (note,) = notes_of(tmp_path, [{"messages": [user('a "b" <c>'), assistant("A")]}], template)
    assert note.startswith("the chat template leaves out or changes messages of the role user")


def test_a_template_that_wants_tools_gets_them_wherever_it_renders(tmp_path):
    wants = "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}" + WITH_TOOLS
    (note,) = notes_of(tmp_path, [{"messages": CHAT, "tools": TOOLS}], wants)
    assert note.startswith("no token that ends an answer is learned")  # it has no chat without them


def test_a_template_with_something_random_is_pointed_out(tmp_path):
    rows = [{"messages": [user("a"), assistant("b")]}]
    chance = "{{ ['x', 'y'] | random }}" + PLAIN.replace("random", "")
    for template, said in ((chance, True), (PLAIN, False)):
        path = jsonl(tmp_path / f"{said}.jsonl", rows)
        reading = load(path, byte_tokenizer(template=template), train_on="all").reading
        assert any("differently each time" in note for note in reading.notes) == said


def test_arguments_of_tool_calls_as_text_are_pointed_out(tmp_path):
    """oumi-ai/oumi#2599: OpenAI gives them as text, which a template may quote once more."""
    as_text, as_objects = (
        [{"messages": [user("a"), {**assistant("b"), "tool_calls": [{"function": call}]}]}]
        for call in ({"name": "f", "arguments": '{"x": 1}'}, {"name": "f", "arguments": {"x": 1}})
    )
    (note,) = notes_of(tmp_path, as_text, WITH_TOOLS)
    assert "arguments of tool calls are JSON text" in note
    assert notes_of(tmp_path, as_objects, WITH_TOOLS) == []
    knows = WITH_TOOLS + "{% if m is defined and m.arguments is string %}{% endif %}"
    assert notes_of(tmp_path, as_text, knows) == []


def notes_of(folder, rows, template):
    return list(
        load(jsonl(folder / "a.jsonl", rows), byte_tokenizer(template=template)).reading.notes
    )
