"""Shares on a local disk: reading and writing them by DeepSpeed's swapper."""

from typing import Any

import torch
from torch import Tensor

from sparse_lora_dist.errors import UserError


class Disk:
    """DeepSpeed's swapper, with every share out of its few buffers as soon as it is read.

    DeepSpeed leaves a share in its buffer until the whole tensor is released, and what it read
    ahead until that is used; when more tensors are alive than there are buffers, it fails.
    """

    def __init__(self, swapper: Any, *, whole_up_to: int) -> None:
        """``whole_up_to``: elements of a tensor that stays whole on every rank."""
        self._swapper, self._whole_up_to = swapper, whole_up_to
        self._parameters: dict[int, Any] = {}
        read = swapper.swap_in

        def read_each_once(params: list[Any], **how: Any) -> None:
            # Its read-ahead names a tensor twice that comes twice soon: at the end of forward.
            read(list({p.ds_id: p for p in params}.values()), **how)

        swapper.swap_in = read_each_once

    def takes(self, parameter: Any, share: int) -> bool:
        """Large shares of what is frozen; DeepSpeed leaves those under 1 MiB in memory."""
        return bool(
            self._swapper.swappable_tensor(numel=share)
            and not parameter.requires_grad
            and not getattr(parameter, "stays_in_memory", False)
            and parameter.ds_numel > self._whole_up_to
        )

    def buffer(self, parameter: Any, own: Tensor) -> Tensor:
        """A share in a buffer, from where ``write`` takes it."""
        if own.numel() > self._swapper.elements_per_buffer:
            raise UserError(
                f"zero_optimization.offload_param.buffer_size is "
                f"{self._swapper.elements_per_buffer} elements, the largest share of a "
                f"tensor has {own.numel()}: raise it, or use more ranks"
            )
        buffer = self._swapper.get_buffer(parameter, own.numel())
        buffer.copy_(own)
        held = torch.empty(0, dtype=own.dtype, device=buffer.device)
        held.data = buffer.data
        return held

    def write(self, parameter: Any) -> None:
        """Write a parameter's share, and give its buffer back."""
        self._parameters[parameter.ds_id] = parameter
        self._swapper.swap_out_and_release([parameter])

    def read(self, parameters: list[Any]) -> None:
        """The shares of these, in memory of their own until DeepSpeed releases the tensors."""
        swapper, missing = self._swapper, []
        swapper.synchronize_reads()
        for p in parameters:
            if p.ds_id in swapper.param_id_to_buffer_id:
                self._take(p)
            elif p.ds_tensor.status.name == "NOT_AVAILABLE":
                missing.append(p)
        if len(missing) > swapper.available_swap_in_buffers():
            ahead = [self._parameters[i] for i in swapper.param_id_to_buffer_id]
            swapper.remove_partition_and_release_buffers(ahead)
        at_once = swapper.param_buffer_count
        for first in range(0, len(missing), at_once):
            swapper.swap_in(missing[first : first + at_once], async_op=False)
            for p in missing[first : first + at_once]:
                self._take(p)

    def _take(self, parameter: Any) -> None:
        share, available = parameter.ds_tensor.data.clone(), parameter.ds_tensor.status
        self._swapper.remove_partition_and_release_buffers([parameter])
        parameter.ds_tensor.data, parameter.ds_tensor.status = share, available
