"""How the model of a run is prompted, and which tokens end its answers, for those who generate with
it.

A base model that learns from chats ends its answers with a token such as <|im_end|>, at which its
own generation_config.json does not stop. So exports carry the chat template that the run used, and
a generation_config.json with these tokens.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from sparse_lora_dist.data import Documents
from sparse_lora_dist.errors import as_user_error
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.system.small_files import parse_json, unique_keys

TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
"""Names of the files, as transformers writes them beside a model."""
OF_THE_LIBRARY = ("_from_model_config", "transformers_version")
"""Keys of generation_config.json that are no settings. With the first, transformers would replace
the file's values by those of config.json."""

CHANGING = """
    repetition_penalty no_repeat_ngram_size suppress_tokens begin_suppress_tokens bad_words_ids
    sequence_bias min_new_tokens min_length forced_bos_token_id forced_eos_token_id num_beams
    exponential_decay_length_penalty guidance_scale stop_strings encoder_repetition_penalty
    encoder_no_repeat_ngram_size watermarking_config token_healing penalty_alpha dola_layers
    num_beam_groups diversity_penalty constraints force_words_ids
""".split()
"""Settings with which transformers' greedy answers are others."""
NEUTRAL = {
    "repetition_penalty": 1.0,
    "num_beams": 1,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "penalty_alpha": 0.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
}
"""Values of these settings that change nothing."""


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """The chat template of a run, and the settings with which its model generates."""

    chat_template: str | None
    """Jinja text that rendered the chats; None if the run trained on none."""
    is_own: bool
    """True if it is the tokenizer's own, and not that of ``--chat_template``."""
    ends: Mapping[str, int]
    """Token that ends an answer -> its id."""
    generation: Mapping[str, Any]
    """Content of generation_config.json: that of the base, with ``ends`` in eos_token_id."""
    learned: Collection[str] | None = None
    """Those of ``ends`` that the data teach; None if all do, or if it is not known: in runs on
    plain text, and of earlier versions."""

    @property
    def learned_ends(self) -> Collection[str]:
        """Tokens with which the model of the run ends its answers."""
        return self.ends if self.learned is None else self.learned

    @classmethod
    def of(cls, model: Model, documents: Documents, *, is_own: bool) -> "Prompting | None":
        """Return how the model of a run is prompted.

        Args:
            model: model of the run.
            documents: documents that it trains on.
            is_own: True without ``--chat_template``.

        Returns:
            None if the documents are neither chats nor end with a token: in a classifier, or a run
            that edits facts.
        """
        if documents.template is None and not documents.ends:
            return None
        settings = generation_settings(model.folder, model.module)
        return cls(
            chat_template=documents.template,
            is_own=is_own,
            ends=documents.ends,
            generation=with_ends(settings, documents.ends.values()),
            learned=None if documents.reading is None else documents.reading.answer_ends,
        )

    def as_json(self) -> dict[str, Any]:
        """Return a dict of JSON values, as a checkpoint holds it."""
        return asdict(self)

    def write(self, folder: Path, *, template: bool = True) -> None:
        """Write generation_config.json into a folder, beside an adapter or a model.

        Args:
            folder: existing folder.
            template: True to write chat_template.jinja too.
        """
        text = json.dumps(self.generation, indent=2, sort_keys=True)
        (folder / GENERATION).write_text(text + "\n", encoding="utf-8")
        if template and self.chat_template is not None:
            (folder / TEMPLATE).write_text(self.chat_template, encoding="utf-8", newline="")


def generation_settings(folder: Path, module: PreTrainedModel) -> dict[str, Any]:
    """Return the settings with which transformers generates with a model: those of its
    generation_config.json, or of config.json if there is no such file.

    Args:
        folder: folder of the model.
        module: the model, which may be on the meta device.

    Raises:
        UserError: the file holds no settings, or something else than ids where generation stops.
    """
    file = folder / GENERATION
    if file.is_file():
        with as_user_error(str(file), "Correct it, or remove it."):
            settings = parse_json(file.read_bytes(), unique_keys)
            if not isinstance(settings, dict) or not _are_ids(settings.get("eos_token_id")):
                raise ValueError("it must map names to settings, and eos_token_id to ids of tokens")
    elif module.can_generate() and module.generation_config is not None:
        settings = module.generation_config.to_diff_dict()
        if (folder / "config.json").is_file():  # as transformers does: a config drops what is in it
            settings |= GenerationConfig.from_pretrained(
                folder, config_file_name="config.json", _from_model_config=True
            ).to_diff_dict()
    else:
        settings = {}
    return {name: value for name, value in settings.items() if name not in OF_THE_LIBRARY}


def _are_ids(ends: object) -> bool:
    """Return True for ids of tokens at which generation stops: one, a list of them, or None."""
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return all(type(i) is int for i in ids)


def end_ids(settings: Mapping[str, Any]) -> list[int]:
    """Return the ids of the tokens at which generation stops; maybe none.

    Args:
        settings: content of generation_config.json.
    """
    ids = settings.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    return [i for i in ids if isinstance(i, int)]


def not_greedy(settings: Mapping[str, Any]) -> str:
    """Return a note about settings that would change greedy answers, and that an evaluation leaves
    out; "" if there are none.

    Args:
        settings: content of generation_config.json.
    """
    names = [n for n in CHANGING if settings.get(n) not in (None, NEUTRAL.get(n), [], {}, False)]
    if not names:
        return ""
    shown = ", ".join(f"{name} {settings[name]}"[:60] for name in names)
    return f"answers are generated greedily, without the base's settings {shown}"


def with_ends(settings: Mapping[str, Any], ends: Collection[int]) -> dict[str, Any]:
    """Return settings with further tokens at which generation stops, after those that are there.

    Args:
        settings: content of generation_config.json.
        ends: ids of the tokens.
    """
    ids = list(dict.fromkeys([*end_ids(settings), *sorted(ends)]))
    return {**settings, **({"eos_token_id": ids[0] if len(ids) == 1 else ids} if ids else {})}
