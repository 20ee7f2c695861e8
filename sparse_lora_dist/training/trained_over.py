"""Compare the base that an adapter was trained over with the one that it is now used over."""

from pathlib import Path

from sparse_lora_dist.adapter.peft_classes import class_names
from sparse_lora_dist.adapter.peft_config import CONFIG
from sparse_lora_dist.adapter.peft_read import local_folder, open_peft
from sparse_lora_dist.adapter.same_on_all_nodes import Opened, check_same_on_all_nodes
from sparse_lora_dist.base_model.weight_map import is_quantized
from sparse_lora_dist.checkpoint.manifest import read_manifest
from sparse_lora_dist.checkpoint.recover import published
from sparse_lora_dist.config.paths import expanded
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.phases import fail_together, first_on_its_node
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.run_folder.description import RUN_YAML
from sparse_lora_dist.run_folder.identity import (
    BASE,
    NOT_STORED,
    TRAINED_OVER,
    Identity,
    in_words,
)
from sparse_lora_dist.system.small_files import parse_json


def check_base(name: str, model: Model) -> None:
    """Raise UserError if an adapter of this project was trained over other weights. Not collective.

    What the weights were is known from the checkpoints of the adapter's run folder, or from the
    file that an export has beside the adapter. It is not compared if only one of the two bases is
    stored in 4 bits.

    Args:
        name: The adapter as the user named it: a folder, or a hub id.
        model: The opened model that it is used over.

    Raises:
        UserError: The content of the base's weight files or config.json differs.
    """
    found = trained_over(Path(expanded(name)))
    if found is None or model.fingerprint is None:
        return
    then, in_4_bits = found
    now = Identity(weights=model.fingerprint.weights, config=model.fingerprint.config)
    if then.weights is None:
        print_line("note", f"the adapter {name} {NOT_STORED}")
    elif in_4_bits != is_quantized(model.files):
        print_line(
            "note",
            f"the adapter {name} was trained over a base that is stored in another form (4 bits or "
            "not), so the weights cannot be compared",
        )
    elif differ := then.differences(now, only=BASE):
        raise UserError(
            f"The adapter {name} was trained over another base than --model {model.name}. What "
            f"differs: {in_words(differ)}. Give its own base with --model. To use it over this one "
            "on purpose, copy the adapter's two files (adapter_*) to a folder by themselves and "
            "give that folder."
        )


def trained_over(folder: Path) -> tuple[Identity, bool] | None:
    """Return what is known about the base of an adapter, and whether it was stored in 4 bits.

    Args:
        folder: Run folder, or folder of an adapter: of a run or of an export.

    Returns:
        Identity without weights if a run is there that did not store it; None if nothing is known.

    Raises:
        UserError: The file that an export has beside the adapter is damaged.
    """
    if (beside := folder / TRAINED_OVER).is_file():
        try:
            about = parse_json(beside.read_bytes())
            return Identity.from_json(about), about["in_4_bits"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{beside} is damaged: {error!r}. Export the adapter again, or remove the file."
            ) from error
    run = folder.parent if folder.name == "adapter" else folder
    if not (run / RUN_YAML).is_file():
        return None
    saved = published(run / "checkpoints")
    if not saved:
        return Identity(), False
    manifest = read_manifest(saved[-1])
    return Identity.of_checkpoint(manifest), manifest["base_in_4_bits"]


def other_name(named: object, adapter: str, model: str) -> str | None:
    """Return a clause if an adapter names another base, and nothing else is known about its base.

    Args:
        named: Value of base_model_name_or_path in the adapter's adapter_config.json.
        adapter: The adapter as the user named it.
        model: Folder or hub id of the model that it is used over.
    """
    found = trained_over(Path(expanded(adapter)))
    if (found is not None and found[0].weights is not None) or not isinstance(named, str):
        return None
    if not named or Path(named).name == Path(model).name:
        return None
    return f"the base model of the adapter is {named}, but --model is {model}"


def check_init_adapter(adapter: str, model: Model) -> None:
    """Compare the base of --init_adapter with the run's, and print a note if only its name is
    known, and differs. Not collective.

    Args:
        adapter: Value of --init_adapter.
        model: The opened model of the run.

    Raises:
        UserError: It was trained over other weights.
    """
    check_base(adapter, model)
    config = Path(expanded(adapter)) / CONFIG
    try:
        named = parse_json(config.read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):  # a hub id; or whoever reads it refuses it
        return
    if note := other_name(named, adapter, model.name):
        print_line("note", f"--init_adapter: {note}")


def same_init_adapter(adapter: str) -> None:
    """Raise UserError if not all nodes have the same adapter of --init_adapter. Collective.

    Args:
        adapter: Value of --init_adapter.

    Raises:
        UserError: It is absent or damaged, or a node has other tensors than rank 0.
    """
    with fail_together("opening --init_adapter"), first_on_its_node():
        _, values, shapes = open_peft(expanded(adapter))
        named = class_names(local_folder(expanded(adapter)))
    check_same_on_all_nodes(
        [Opened(name=f"--init_adapter {adapter}", values=values, shapes=shapes, classes=named)]
    )
