"""What a checkpoint calls the parameters of a model, where it was saved by another class."""

from collections.abc import Collection, Iterator

from transformers import PreTrainedModel


def aliases(held: Collection[str], model: PreTrainedModel) -> dict[str, str]:
    """{name in ``model``: name in ``held``} where the two differ, as ``from_pretrained`` finds it.

    A base model (BertModel) saves its tensors without the prefix that they have below a head
    (``bert.``), and the first BERTs call the weight and bias of a norm gamma and beta.
    """
    found = {}
    for name in model.state_dict():
        known = next((other for other in _spellings(name, model) if other in held), name)
        if known != name:
            found[name] = known
    return found


def _spellings(name: str, model: PreTrainedModel) -> Iterator[str]:
    for prefixed in (name, name.removeprefix(f"{model.base_model_prefix}.")):
        yield prefixed
        old = prefixed.replace("LayerNorm.weight", "LayerNorm.gamma")
        yield old.replace("LayerNorm.bias", "LayerNorm.beta")
