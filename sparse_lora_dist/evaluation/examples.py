"""Reads evaluation examples: the chat up to the answer, the choices, and the right answer."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data.examples import Examples, rows_of_another_template
from sparse_lora_dist.data.fields import (
    DEFAULTS,
    MESSAGES,
    TOOLS,
    ExampleError,
    Fields,
    Message,
    Tools,
    chat_of,
    refuse_unsupported,
    renders_tools,
    text_of,
    tools_of,
)
from sparse_lora_dist.data.read_files import plainly, read_examples
from sparse_lora_dist.data.reading import (
    Reading,
    describe,
    template_source,
    unread_keys,
)
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.right_answers import LETTERS

Item = TypeVar("Item")

MAX_SHOWN = 5
"""Largest number of faulty examples that an error names. Further ones are only counted."""


KINDS = ("text", "letter", "index")
"""What the answer of a multiple-choice example may be, in the order in which it is looked for."""


class ExampleTooLong(ExampleError):
    """Raised if an example has more tokens than --sequence_length.

    Args:
        tokens: Number of tokens of the example.
        most: Value of --sequence_length.
    """

    def __init__(self, tokens: int, most: int) -> None:
        super().__init__(f"The example has {tokens} tokens, more than --sequence_length {most}.")
        self.tokens = tokens


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """How the answer of a multiple-choice example can be read."""

    index: int
    """Number of the example in the data."""
    as_label: int | None
    """Index of the choice of which it is the label; None if it is none."""
    otherwise: int | None
    """Index of the choice that it gives as text, letter or index; None if it gives none."""
    is_index: bool
    """True if it is an index from 0 of a choice."""
    is_number: bool
    """True if the data hold a number, not text."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The evaluation data, with methods that read the fields of one example.

    An example is passed to the methods as ``record``, a mapping from column names to values.

    Prompts are read from the column named by ``--prompt_field``. If the option has its default and
    there is no such column, they are read from column ``question``. Answers are read from
    ``--response_field`` or ``answer`` by the same rule. A column ``messages`` takes precedence
    over both unless one of these options was given: it holds chats that end with the right answer.
    """

    examples: Examples
    """The examples, with their files and lines for messages."""
    data: DataConfig
    """Data options of the evaluation."""

    @classmethod
    def read(cls, source: str, data: DataConfig, limit: int | None) -> "Table":
        """Read the examples. Not collective.

        To be called on one rank of each node before the others (see ``first_on_its_node``), so
        that it fills the cache on disk, from which the others read.

        Args:
            source: File, folder or hub id of the examples.
            data: Data options of the evaluation.
            limit: Largest number of examples to read, from the first on; None for all.
        """
        examples = read_examples(
            source,
            split="test",
            max_samples=limit,
            flag="--eval_data",
            column_names=data.column_names,
        )
        refuse_unsupported(examples.names.columns, f"--eval_data {source}")
        return cls(examples=examples, data=data)

    @property
    def has_chats(self) -> bool:
        """True if the examples are read from the column ``messages``."""
        options = ("prompt_field", "response_field")
        given = any(getattr(self.data, name) != DEFAULTS[name] for name in options)
        return MESSAGES in self.examples.names.columns and not given

    @property
    def has_tools(self) -> bool:
        """True if the examples have a column ``tools``."""
        return TOOLS in self.examples.names.columns

    def reading(
        self, template: str | None, chat_template: str | None, tokenizer: PreTrainedTokenizerFast
    ) -> Reading:
        """Return what of the data the metrics with questions read.

        Args:
            template: Text of the chat template; None for plain text.
            chat_template: Value of --chat_template.
            tokenizer: Tokenizer of the model.
        """
        own = tokenizer.chat_template
        found = self.examples.names.columns
        columns = [MESSAGES] if self.has_chats else [self.column("prompt")]
        has_answer = "choices" in found or not self.has_chats
        names = (self.data.response_field, "answer") if has_answer else ()
        columns += [name for name in names if name in found][:1]
        columns += ["choices"] if "choices" in found else []
        columns += [TOOLS] if renders_tools(found, template) else []
        fields = Fields(kind="messages" if self.has_chats else "pair", columns=tuple(columns))
        other = rows_of_another_template(self.examples, template, own) if self.has_tools else ""
        return describe(
            self.examples,
            columns,
            unread_columns=unread_keys(self.examples, fields, tokenizer, template),
            notes=(other,) if other else (),
            template=template_source(chat_template, template, own),
        )

    def map(self, make: Callable[["Table", Mapping[str, Any]], Item]) -> list[Item]:
        """Return ``make(self, record)`` for every example.

        Args:
            make: Function (table, example) that encodes one example. It raises ExampleError if the
                example is wrong.

        Returns:
            The results of ``make``, in the order of the examples.

        Raises:
            UserError: ``make`` raised ExampleError for some examples. The message gives the file,
                line and reason of the first ones, and the number of the others.
        """
        items: list[Item] = []
        faults: list[tuple[int, ExampleError]] = []
        for index, record in enumerate(self.examples):
            try:
                items.append(make(self, record))
            except ExampleError as error:
                faults.append((index, error))
            except UserError:
                raise
            except Exception as error:  # text that no tokenizer takes
                what = f"This example cannot be tokenised: {plainly(error)}. Correct it."
                raise self.examples.fault(index, what) from error
        if faults:
            raise self._error(faults)
        return items

    def _error(self, faults: Sequence[tuple[int, ExampleError]]) -> UserError:
        """Return one error about all faulty examples.

        Args:
            faults: (index of the example in the data, its error) of each.
        """
        lines = [str(self.examples.fault(index, str(error))) for index, error in faults[:MAX_SHOWN]]
        if len(faults) > MAX_SHOWN:
            lines.append(f"and {len(faults) - MAX_SHOWN:,} more examples like these")
        longest = max((e.tokens for _, e in faults if isinstance(e, ExampleTooLong)), default=0)
        if longest:
            lines.append(f"Set --sequence_length {longest} or more to keep the longest.")
        return UserError("\n".join(lines))

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        """Return the messages of an example's chat, up to the answer.

        An example without column ``messages`` is a chat of one user message, the prompt.

        Args:
            record: The example, as a mapping from column names to values.

        Raises:
            ExampleError: The chat is wrong or has no message before the answer.
        """
        if not self.has_chats:
            column = self.column("prompt")
            return [{"role": "user", "content": text_of(record.get(column), repr(column))}]
        chat = chat_of(record.get(MESSAGES))
        chat = chat[:-1] if chat[-1]["role"] == "assistant" else chat
        if not chat:
            raise ExampleError(
                f"{MESSAGES!r} has no message before the answer. Add the question to it."
            )
        return chat

    def tools(self, record: Mapping[str, Any]) -> Tools:
        """Return the functions that the model may call in an example; None if there are none.

        Args:
            record: The example, as a mapping from column names to values.

        Raises:
            ExampleError: The column ``tools`` is not a list.
        """
        return tools_of(record)

    def reference(self, record: Mapping[str, Any]) -> str:
        """Return the right answer of an example as text.

        In column ``messages`` that is the last message, which must be the assistant's.

        Args:
            record: The example, as a mapping from column names to values.

        Raises:
            ExampleError: The example has no answer, or it is not text.
        """
        if not self.has_chats:
            column = self.column("response")
            return text_of(record.get(column), repr(column))
        last = chat_of(record.get(MESSAGES))[-1]
        if last["role"] != "assistant":
            raise ExampleError(
                f"{MESSAGES!r} must end with an assistant message, the right answer. Add it."
            )
        return str(last["content"])

    def choices(self, record: Mapping[str, Any]) -> tuple[list[str], int]:
        """Return the choices of a multiple-choice example, and the index of the right one.

        The answer is an index from 0, a label or letter, or the text of a choice. It is read as a
        label only if ``reads_labels``, and otherwise as what ``answers_are`` says.

        Args:
            record: The example, as a mapping from column names to values.

        Returns:
            (texts of the choices, index of the right one).

        Raises:
            ExampleError: The choices are wrong, or the answer matches none of them.
        """
        answer, texts, labels = self._answer_and_choices(record)
        labels = labels if labels and self.reads_labels else ()
        kind = None if labels else self.answers_are
        right = index_of_answer(answer, texts, labels, repr(self.column("response")), kind)
        return texts, texts.index(texts[right])  # of equal texts the first is taken as the answer

    def _answer_and_choices(
        self, record: Mapping[str, Any]
    ) -> tuple[object, list[str], Sequence[object]]:
        """Return the answer of a multiple-choice example as it stands in the data, and the texts
        and labels of its choices.

        Column ``choices`` is a list of texts, or a dict of the lists ``text`` and ``label``, as in
        ARC. The answer is read from ``--response_field`` or ``answer``, even if there is a column
        ``messages``.

        Raises:
            ExampleError: The choices are wrong, or two of them have one label.
        """
        if "choices" not in (columns := self.examples.names.columns):
            raise UserError(
                f"--eval_data {self.examples.source} has no column 'choices', which the metrics of "
                f"choices need. Its columns are: {', '.join(columns)}. Name the column of the "
                "choices so, or give other --metrics."
            )
        given: Any = record.get("choices")
        labels: Any = ()
        if isinstance(given, dict):
            labels, given = given.get("label") or (), given.get("text")
        if not isinstance(given, list) or len(given) < 2:
            raise ExampleError(
                f"'choices' must be a list of at least two texts, got {str(given)[:40]}. "
                "Correct this example."
            )
        texts = [text_of(choice, "a choice") for choice in given]
        if labels and (not isinstance(labels, list) or len(labels) != len(texts)):
            raise ExampleError(
                f"'choices' has {len(texts)} texts, but the labels {str(labels)[:40]}. Give each "
                "text one label, or leave the labels out."
            )
        if twice := [label for label, n in Counter(map(_word, labels)).items() if n > 1]:
            raise ExampleError(
                f"'choices' has the label {twice[0][:40]!r} twice, so it is not clear which choice "
                "is right. Correct or remove this example."
            )
        return record.get(self.column("response")), texts, labels

    @cached_property
    def reads_labels(self) -> bool:
        """True if the answers are read as the labels that the data give to their choices.

        One rule for all examples that are read: they are labels if every answer is one. If some
        are none, no answer is read as a label.

        Raises:
            UserError: It is not clear which choices are right: some answers are labels, others
                texts or letters; or all are whole numbers that are both labels and indices.
        """
        rows = list(self._readings())
        others = [row for row in rows if row.as_label is None]
        clashes = [row for row in rows if row.as_label not in (None, row.otherwise)]
        if clashes and others and not all(row.is_index for row in rows):
            raise self.examples.fault(
                others[0].index,
                "The answer is no label of its choices, but the answer at "
                f"{self.examples.place(clashes[0].index)} is one. Give labels alone, or leave the "
                "labels out.",
            )
        if clashes and not others and all(row.is_index and row.is_number for row in rows):
            raise self.examples.fault(
                clashes[0].index,
                "All answers are whole numbers that are labels of choices and indices from 0 as "
                'well. Write labels as text, such as "1", or leave the labels out for indices.',
            )
        return not others

    @cached_property
    def answers_are(self) -> str | None:
        """What all answers that are no labels are: "text" of a choice, else "letter", else "index";
        None if they are not all of one kind.

        Raises:
            UserError: They are not, and one of them is a text, letter or index of several choices.
        """
        rows: list[tuple[int, dict[str, int]]] = []
        for index, record in enumerate(self.examples):
            with suppress(ExampleError):  # ``choices`` raises it again
                answer, texts, labels = self._answer_and_choices(record)
                if not (labels and self.reads_labels) and (fits := _fits(answer, texts)):
                    rows.append((index, fits))
        for kind in KINDS:
            if all(kind in fits for _, fits in rows):
                return kind
        for index, fits in rows:
            if len(set(fits.values())) > 1:
                kinds = " and as ".join(f"a {kind}" for kind in fits).replace("a index", "an index")
                raise self.examples.fault(
                    index,
                    f"The answer can be read as {kinds}, which give different choices, and not all "
                    "answers of the data are of one of these kinds. Give all answers as texts of "
                    "choices, as letters or as indices from 0.",
                )
        return None

    def _readings(self) -> Iterator[_Reading]:
        """Yield how the answer of each example with labels can be read. Wrong examples are left
        out."""
        for index, record in enumerate(self.examples):
            with suppress(ExampleError):  # ``choices`` raises it again
                answer, texts, labels = self._answer_and_choices(record)
                words = [_word(label) for label in labels]
                as_label = words.index(_word(answer)) if _word(answer) in words else None
                otherwise = _index_or_none(answer, texts)
                if labels and (as_label, otherwise) != (None, None):
                    yield _Reading(
                        index=index,
                        as_label=as_label,
                        otherwise=otherwise,
                        is_index=_word(answer) in map(str, range(len(texts))),
                        is_number=isinstance(answer, int),
                    )

    def column(self, kind: str) -> str:
        """Return the name of the column that holds the prompts or the answers.

        Args:
            kind: "prompt" for --prompt_field, or "response" for --response_field.

        Raises:
            UserError: The data have neither the option's column nor, if the option has its default,
                the second one ("question" or "answer").
        """
        flag, second = f"{kind}_field", {"prompt": "question", "response": "answer"}[kind]
        named, columns = getattr(self.data, flag), self.examples.names.columns
        if named in columns:
            return str(named)
        is_default = named == getattr(DataConfig(), flag)
        if is_default and second in columns:
            return second
        wanted = f"{named!r} or {second!r}" if is_default else repr(named)
        raise UserError(
            f"--eval_data {self.examples.source} has no column {wanted}. Its columns are: "
            f"{', '.join(columns)}. Give the column of the {kind} with --{flag}."
        )


def index_of_answer(
    answer: object,
    texts: Sequence[str],
    labels: Sequence[object],
    name: str,
    kind: str | None = None,
) -> int:
    """Return the index of the choice that an example gives as the right one.

    If several choices match, it is the first of them.

    It is compared with the labels that the data give, as in ARC, then with the choices' texts, then
    with letters, then with indices from 0. An integer is not compared with texts. For example, the
    answer "1" to the choices ["2", "1"] is the second choice, unless their labels are "1" and "2".

    Args:
        answer: The right answer as it stands in the data.
        texts: Texts of the choices.
        labels: Labels of the choices in the data, e.g. "A"; () if it gives none.
        name: Name of the answer's column, for messages.
        kind: One of ``KINDS`` to read it as that only.

    Raises:
        ExampleError: The answer matches no choice.
    """
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        raise ExampleError(
            f"{name} must be an index, a label or the text of a choice, got {answer!r}. Correct it."
        )
    if _word(answer) in (words := [_word(label) for label in labels[: len(texts)]]):
        return words.index(_word(answer))
    fits = _fits(answer, texts)
    if labels:
        fits.pop("letter", None)
    if kind in fits:
        return fits[kind]
    if not fits:
        raise ExampleError(
            f"{name} is {answer!r}, which matches none of the example's {len(texts)} choices. Give "
            "an index from 0, a label or the text of a choice."
        )
    return next(iter(fits.values()))


def _fits(answer: object, texts: Sequence[str]) -> dict[str, int]:
    """Return the index of the choice that an answer is, for each of ``KINDS`` that it can be."""
    names: tuple[Sequence[object], ...] = (texts, LETTERS[: len(texts)], range(len(texts)))
    fits = {}
    for kind, some in zip(KINDS, names, strict=True):
        words = [_word(one) for one in some]
        if _word(answer) in words and (isinstance(answer, str) or kind == "index"):
            fits[kind] = words.index(_word(answer))
    return fits


def _word(value: object) -> str:
    """Return an answer, a label or a choice as it is compared with others."""
    return str(value).strip()


def _index_or_none(answer: object, texts: Sequence[str]) -> int | None:
    """Return the index of the choice that an answer gives without labels; None if it gives none."""
    try:
        return index_of_answer(answer, texts, (), "")
    except ExampleError:
        return None
