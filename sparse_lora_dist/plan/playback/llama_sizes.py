"""A Llama of the same sizes, in place of an architecture that cannot be planned."""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from sparse_lora_dist.errors import UserError

NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
OPTIONAL = ("num_key_value_heads", "head_dim", "tie_word_embeddings")


def as_llama(config: Any, problem: str) -> LlamaConfig:
    """Make a LlamaConfig with the sizes in ``config``, a mapping or an object.

    Args:
        problem: why a Llama is needed; error messages begin with it.

    Raises:
        UserError: if sizes are missing or invalid; it names the fields that are needed, those that
            the config has, and those that are missing.
    """

    def read(name: str) -> Any:
        return config.get(name) if isinstance(config, dict) else getattr(config, name, None)

    got = [name for name in NEEDED if isinstance(read(name), int) and read(name) > 0]
    missing = [name for name in NEEDED if name not in got]
    if missing:
        raise UserError(
            f"--model: {problem}. To plan it as a Llama, config.json must have "
            f"{', '.join(NEEDED)} as integers above 0 (optional: {', '.join(OPTIONAL)}). "
            f"It has {', '.join(got) or 'none of them'}; "
            f"missing or invalid: {', '.join(missing)}."
        )
    sizes = {name: read(name) for name in (*NEEDED, *OPTIONAL)}
    try:
        return LlamaConfig(**{name: size for name, size in sizes.items() if size is not None})
    except (StrictDataclassError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"--model: {problem}, and its sizes do not make a Llama: {error}"
        ) from error
