"""What a run is trained over and on, as hashes of contents.

Names do not say it: a file may be written anew under its old name, and a copy has another name. A
checkpoint stores the identity of its run, and whoever goes on with the run, or uses its adapter,
compares it with what is there now.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

WORDS = {
    "weights": "the weights of the base",
    "config": "config.json of the base",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "data": "the tokenised rows of --data",
    "data_files": "the files of --data",
    "eval_data": "the tokenised rows of --eval_data",
}
"""Field of ``Identity`` -> what it is a hash of, for messages."""
BASE = ("weights", "config")
"""Fields that concern the base model. The others concern the data."""
READS_TEXT = ("tokenizer", "chat_template")
"""Fields of what makes tokens of text. An evaluation compares them."""
SHAPES_ROWS = ("tokenizer", "chat_template", "data_files")
"""Fields of what rows are made from. If all rows were compared and are the same, a difference in
these changes nothing that is trained."""
ALL = "all "
"""Beginning of ``data`` and ``eval_data`` if every row was hashed, and not a sample of them."""

TRAINED_OVER = "trained_over.json"
"""File beside an exported adapter, with hashes of the base that it was trained over, and of its
tokenizer and chat template."""
LOOK = "look"
"""Key of the description of a run over an architecture that was looked at (``model.look``) and is
set up in another way for it."""
NOT_STORED = (
    "was saved by a version that did not store what the base weights were: whether they are the "
    "same cannot be compared"
)
"""End of the line that is printed for a checkpoint without an identity; its folder comes first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Hashes of what a run is trained over and on. None: the run has no such thing, or it was made
    by a version that did not store it."""

    weights: str | None = None
    """Samples of every tensor of the base, with its name, dtype and shape."""
    config: str | None = None
    """Content of the base's config.json."""
    tokenizer: str | None = None
    chat_template: str | None = None
    """Template that renders chats: that of ``--chat_template``, or the tokenizer's own."""
    data: str | None = None
    """Token ids and labels of the training documents (``data.fingerprint.hash_of_documents``)."""
    data_files: str | None = None
    """Sizes and samples of the files of ``--data`` that are on this machine."""
    eval_data: str | None = None
    """As ``data``, of ``--eval_data``."""

    def as_json(self) -> dict[str, str]:
        """Return field name -> hash, without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Identity":
        """Return the identity that ``as_json`` gave; {} gives one in which nothing is known."""
        return cls(**{f.name: saved.get(f.name) for f in fields(cls)})

    @classmethod
    def of_checkpoint(cls, manifest: Mapping[str, Any]) -> "Identity":
        """Return the identity that a checkpoint stores.

        Args:
            manifest: content of its manifest.json.
        """
        return cls.from_json(manifest["description"].get("identity", {}))

    def of_base(self, *, in_4_bits: bool) -> str:
        """Return the text of ``TRAINED_OVER``.

        Args:
            in_4_bits: True if the base's files hold 4-bit weights.
        """
        own = (*BASE, *READS_TEXT)
        base = {name: value for name, value in self.as_json().items() if name in own}
        return json.dumps(base | {"in_4_bits": in_4_bits}, indent=1) + "\n"

    def differences(self, now: "Identity", only: Collection[str] = tuple(WORDS)) -> list[str]:
        """Return the names of the fields that both have, and that differ.

        Args:
            now: the other identity.
            only: names of the fields to compare.
        """
        both = ((name, getattr(self, name), getattr(now, name)) for name in WORDS if name in only)
        return [name for name, was, is_ in both if None not in (was, is_) and was != is_]

    def has_all_rows_of(self, now: "Identity") -> bool:
        """Return True if every row was compared with those of ``now``, and all are the same."""
        rows = [self.data, self.eval_data]
        others = [now.data, self.eval_data and now.eval_data]
        return self.data is not None and all(
            was == other and (was is None or was.startswith(ALL))
            for was, other in zip(rows, others, strict=True)
        )


def in_words(names: Collection[str]) -> str:
    """Return what differs as a phrase for messages.

    Args:
        names: names of fields of ``Identity``.
    """
    return ", ".join(WORDS[name] for name in names)
