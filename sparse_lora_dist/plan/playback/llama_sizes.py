"""Makes the config of a Llama of the same sizes, for a model whose own architecture cannot be
planned: transformers does not know it, or it cannot run on the meta device."""

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
"""Fields that config.json must have, as integers above 0."""
WIDTHS = ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "n_inner")
"""Names of the width inside an MLP, in the order in which they are read. Architectures that have
none of them, such as Bloom, make it 4 x hidden_size."""
OPTIONAL = ("num_key_value_heads", "head_dim", "tie_word_embeddings")
"""Fields that are read if config.json has them; otherwise LlamaConfig's defaults are used."""


def as_llama(config: Any, problem: str) -> LlamaConfig:
    """Return a LlamaConfig with the sizes in ``config``.

    Args:
        config: content of config.json as a dict, or a config object of transformers.
        problem: why the architecture itself cannot be planned; error messages begin with it.

    Raises:
        UserError: if a size is missing or invalid.
    """

    def field(name: str) -> Any:
        return config.get(name) if isinstance(config, dict) else getattr(config, name, None)

    def read(name: str) -> Any:
        if name != "intermediate_size" or isinstance(config, dict):
            return field(name)
        hidden = field("hidden_size")
        four_times = 4 * hidden if isinstance(hidden, int) else None
        return next((size for width in WIDTHS if (size := field(width)) is not None), four_times)

    got = [name for name in NEEDED if isinstance(read(name), int) and read(name) > 0]
    missing = [name for name in NEEDED if name not in got]
    if missing:
        raise UserError(
            f"--model: {problem}. To plan it as a Llama, config.json must have "
            f"{', '.join(NEEDED)} as integers above 0 (optional: {', '.join(OPTIONAL)}). "
            f"It has {', '.join(got) or 'none of them'}. "
            f"Missing or invalid are {', '.join(missing)}. Add these fields to a copy of "
            "config.json in another folder, and plan that."
        )
    sizes = {name: read(name) for name in (*NEEDED, *OPTIONAL)}
    try:
        return LlamaConfig(**{name: size for name, size in sizes.items() if size is not None})
    except (StrictDataclassError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"--model: {problem}, and its sizes do not make a Llama: {error}. Correct the sizes in "
            "config.json."
        ) from error
