"""What workers run for ``test_penalty.py``: the gradient of a run's first step, with the tensors it
was taken at."""

from unittest.mock import patch

from torch import Tensor

from sparse_lora_dist.sparsity.shards import Shards
from tests.work.run import train

Part = tuple[int, Tensor, Tensor]


def first_gradients(flags: list[str]) -> dict[str, Part]:
    """Name -> (start, this rank's part of the tensor, of its gradient), flattened."""
    seen: dict[str, Part] = {}
    observe = Shards.observe

    def watched(self: Shards, step: int) -> None:
        for name, component in self.sparse.items() if step == 1 else ():
            w, grad = self.engine.master(component), self.engine.gradient(component)
            seen[name] = (component.start, w.clone(), grad.clone())
        observe(self, step)

    with patch.object(Shards, "observe", watched):
        train(flags)
    return seen
