"""A Llama in place of an architecture that cannot be looked into."""

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
    """One of the sizes in ``config``, a mapping or an object.

    Raises:
        UserError: ``problem``, the fields that are needed, those that are there, those that are
            missing or no numbers above 0; or why these are no Llama's.
    """

    def read(name: str) -> Any:
        return config.get(name) if isinstance(config, dict) else getattr(config, name, None)

    got = [name for name in NEEDED if isinstance(read(name), int) and read(name) > 0]
    missing = [name for name in NEEDED if name not in got]
    if missing:
        raise UserError(
            f"--model: {problem}. A plan for it needs {', '.join(NEEDED)} in config.json "
            f"(and {', '.join(OPTIONAL)} where they are not as usual); "
            f"got {', '.join(got) or 'none of them'}; missing are {', '.join(missing)}."
        )
    sizes = {name: read(name) for name in (*NEEDED, *OPTIONAL)}
    try:
        return LlamaConfig(**{name: size for name, size in sizes.items() if size is not None})
    except (StrictDataclassError, ValueError, ArithmeticError) as error:
        raise UserError(f"--model: {problem}, and its sizes are no Llama's: {error}") from error
