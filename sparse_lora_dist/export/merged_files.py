"""Writes the files of a merged model besides its weights: config, tokenizer, chat template and
generation settings."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError, as_user_error
from sparse_lora_dist.export.open_base import Base, read_labelled_config
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.model.prompting import TEMPLATE, Prompting
from sparse_lora_dist.system.own_files import MARKER, ascii_name
from sparse_lora_dist.system.small_files import parse_json

NOT_COPIED = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".onnx",
    ".msgpack",
    ".h5",
    ".ot",
    ".ckpt",
    ".npz",
)
"""Suffixes of weight files, which are not copied from the base.

Indices of weight files (*.index.json), README.md and the config of an adapter beside the base,
whose weights transformers would look for, are not copied either. All other files are, e.g. the
tokenizer's, unless they are ``NO_PART``.
"""
NO_PART = re.compile(
    r"\..*"  # hidden: secrets (.env), .gitattributes
    r"|.*~|#.*#|.*\.(bak|orig|rej|swp|swo|save|tmp)"  # of an editor
    r"|trainer_state\.json|trainer_log\.jsonl|training_args\..*|(all|train|eval)_results\.json"
    r"|(optimizer|scheduler|scaler|rng_state|random_states)(_\d+)?(\.(?!py$).*)?"
    r"|events\.out\.tfevents.*|latest|zero_to_fp32\.py"
    r"|hf_quant_config\.json|quant(ize)?_config\.json"  # merged weights are not quantised
)
"""Names of files in the folder of a base that are no part of the model: hidden files, an editor's
copies, the state of a training, and settings with which another program has quantised it."""
MORE_TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps a tokenizer's other chat templates: NAME.jinja."""
PROCESSOR = ("processor_config.json", "preprocessor_config.json")
"""Files of a model that reads images or sounds."""
TOKENIZER, OLD_TEMPLATE = "tokenizer_config.json", "chat_template.json"
"""Files that may hold chat templates too: of a tokenizer, and of an older processor."""


def copy_other_files(trained: Trained, base: Base, folder: Path, dtype: torch.dtype) -> None:
    """Write all files of a merged model but its weights.

    Args:
        trained: The run whose updates are merged.
        base: The base model that they are merged into.
        folder: Empty folder to write into.
        dtype: Dtype of the merged weights.

    Raises:
        UserError: a file of the base is a link that leads nowhere, or its tokenizer is missing or
            damaged.
    """
    advice = "Give an intact copy of the base with --base FOLDER."
    trusts = trained.config.model.trust_remote_code
    with as_user_error(f"The tokenizer in {base.folder}", advice):
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=trusts)
    copy_from(base.folder, folder)
    config = read_labelled_config(trained, base.folder)
    saved_class = base.saved_class
    config.architectures = [saved_class.name if saved_class else type(base.module).__name__]
    config.dtype = dtype
    text = config.get_text_config()
    # Without one, rows could not be scored together.
    if trained.classes and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = tokenizer.pad_token_id
    if base.tied:
        for part in (config, text):
            part.tie_word_embeddings = False
    config.save_pretrained(folder)
    with as_user_error(f"The tokenizer in {base.folder}", advice):
        _write_templates(trained.prompting, base.folder, folder)
    if trained.prompting is not None:
        trained.prompting.write(folder, template=False)


def copy_from(base: Path, folder: Path) -> None:
    """Copy the files that ``files_to_copy`` returns, and print which others are ``NO_PART``.

    The line is not of the model card, since the card is uploaded.

    Args:
        base: folder of the base model.
        folder: folder to copy them to.

    Raises:
        UserError: some are links that lead nowhere.
    """
    for path in files_to_copy(base):
        shutil.copyfile(path, folder / path.name)
    left = sorted(
        path.name
        for path in base.iterdir()
        if path.is_file() and not _is_known(path.name) and NO_PART.fullmatch(path.name)
    )
    if left:
        print_line(
            "left out", f"{', '.join(map(ascii_name, left))} of {base}: no part of the model"
        )


def _is_known(name: str) -> bool:
    """Return True if a merged model has a file of its own in place of this one."""
    own = ("README.md", "adapter_config.json", MARKER)
    return name.endswith((*NOT_COPIED, ".index.json")) or name in own


def files_to_copy(base: Path) -> list[Path]:
    """Return the files of a base model that a merged model needs besides its weights.

    Args:
        base: folder of the base model.

    Raises:
        UserError: some of them are links that lead nowhere, as in a hub cache of which a part was
            removed. The merged model would lack them.
    """
    others = [
        path
        for path in sorted(base.iterdir())
        if not _is_known(path.name) and not NO_PART.fullmatch(path.name)
    ]
    if broken := [path.name for path in others if path.is_symlink() and not path.exists()]:
        are = "is a link" if len(broken) == 1 else "are links"
        raise UserError(
            f"In the base model {base}, {', '.join(broken)} {are} to no file, so the "
            "merged model would lack it. Download the model again, or give an intact copy of it "
            "with --base FOLDER."
        )
    return [path for path in others if path.is_file()]


def _write_templates(prompting: Prompting | None, base: Path, folder: Path) -> None:
    """Write the chat template of a run over those of the base, if it is another one.

    The base's own stay, all of them if it has several.

    Args:
        prompting: How the run's model is prompted; None if that is not known.
        base: Folder of the base model.
        folder: Folder of the merged model, with copies of the base's files.
    """
    own = _templates_of(base)
    used = None if prompting is None else prompting.chat_template
    keeps = prompting is None or used is None or (prompting.is_own and used in own.values())
    if keeps and not (base / MORE_TEMPLATES).is_dir():
        return
    templates = own if keeps or used is None else {"default": used}
    if not keeps and any((base / name).is_file() for name in PROCESSOR):
        print_line(
            "left out",
            f"the chat template of the processor of {base}: that of the run takes its place. If it "
            "is for texts alone, the merged model is not prompted with images",
        )
    for name in (TEMPLATE, OLD_TEMPLATE):
        (folder / name).unlink(missing_ok=True)
    settings = _settings_of(folder)
    settings.pop("chat_template", None)
    if [*templates] == ["default"]:
        (folder / TEMPLATE).write_text(templates["default"], encoding="utf-8", newline="")
    else:  # as a list in one file: an export has no folders
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        settings |= {"chat_template": listed}
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / TOKENIZER).write_text(text + "\n", encoding="utf-8")


def _templates_of(base: Path) -> dict[str, str]:
    """Return name -> text of the chat templates of a model's tokenizer. The only one, or that for
    all chats, is called "default"."""
    files = {path.stem: path for path in sorted((base / MORE_TEMPLATES).glob("*.jinja"))}
    if (base / TEMPLATE).is_file():
        files = {"default": base / TEMPLATE} | files
    if files:
        return {name: path.read_bytes().decode("utf-8") for name, path in files.items()}
    own = _settings_of(base).get("chat_template")
    if isinstance(own, list):
        return {str(one["name"]): str(one["template"]) for one in own}
    return {"default": own} if isinstance(own, str) else {}


def _settings_of(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER
    found: dict[str, Any] = parse_json(path.read_bytes()) if path.is_file() else {}
    return found
