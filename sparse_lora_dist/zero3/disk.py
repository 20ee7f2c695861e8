"""Keep shards of parameters on a local disk (NVMe offload), with DeepSpeed's parameter swapper.

DeepSpeed's swapper copies shards between files and a fixed number of pinned buffers in memory.
"""

from typing import Any

import torch
from torch import Tensor

from sparse_lora_dist.errors import UserError


class Disk:
    """Reads and writes shards through DeepSpeed's swapper, and frees its buffers after each read.

    DeepSpeed itself keeps a shard in a buffer until the gathered tensor is released, and a
    prefetched shard until it is used. It fails if more tensors are in use than there are buffers.
    Here each shard is copied out of its buffer as soon as it is read. To write a new shard, call
    ``takes``, then ``buffer``, then ``write``. No method is collective.

    Args:
        swapper: DeepSpeed's AsyncPartitionedParameterSwapper.
        whole_up_to: tensors of at most this many elements are not written to disk, since every
            rank keeps them whole in memory.
    """

    def __init__(self, swapper: Any, *, whole_up_to: int) -> None:
        self._swapper, self._whole_up_to = swapper, whole_up_to
        self._parameters: dict[int, Any] = {}
        read = swapper.swap_in

        def read_each_once(params: list[Any], **how: Any) -> None:
            # Prefetching asks twice for a tensor that is needed twice soon, as at the end of
            # forward.
            read(list({p.ds_id: p for p in params}.values()), **how)

        swapper.swap_in = read_each_once

    def takes(self, parameter: Any, share: int) -> bool:
        """Return True if the shard of a parameter is kept on disk, and False if it is in memory.

        Large shards of frozen parameters are kept on disk. DeepSpeed keeps shards under 1 MiB in
        memory.

        Args:
            parameter: the parameter, already converted by DeepSpeed.
            share: number of elements of its shard, padding included.
        """
        return bool(
            self._swapper.swappable_tensor(numel=share)
            and not parameter.requires_grad
            and not getattr(parameter, "stays_in_memory", False)
            and parameter.ds_numel > self._whole_up_to
        )

    def buffer(self, parameter: Any, own: Tensor) -> Tensor:
        """Copy a shard into one of the swapper's buffers, from which ``write`` writes it to disk.

        Args:
            parameter: the parameter that the shard belongs to.
            own: this rank's shard of the parameter, 1-D.

        Returns:
            1-D tensor in the buffer's memory that holds the shard, in the dtype of ``own``.

        Raises:
            UserError: the shard is larger than a buffer.
        """
        if own.numel() > self._swapper.elements_per_buffer:
            raise UserError(
                f"zero_optimization.offload_param.buffer_size is "
                f"{self._swapper.elements_per_buffer} elements, but a shard of the base has "
                f"{own.numel()}. Raise buffer_size to at least that, or use more ranks."
            )
        buffer = self._swapper.get_buffer(parameter, own.numel())
        buffer.copy_(own)
        held = torch.empty(0, dtype=own.dtype, device=buffer.device)
        held.data = buffer.data
        return held

    def write(self, parameter: Any) -> None:
        """Write the shard of ``parameter`` from its buffer to disk, and free the buffer.

        Call it once ``parameter.ds_tensor`` is the tensor that ``buffer`` returned.
        """
        self._parameters[parameter.ds_id] = parameter
        self._swapper.swap_out_and_release([parameter])

    def read(self, parameters: list[Any]) -> None:
        """Read the shards of ``parameters`` from disk into memory outside the swapper's buffers.

        DeepSpeed calls it before it gathers the parameters. Shards that are in memory already are
        not read. The shards stay in memory until DeepSpeed releases the gathered tensors.
        """
        swapper, missing = self._swapper, []
        swapper.synchronize_reads()
        for p in parameters:
            if p.ds_id in swapper.param_id_to_buffer_id:
                self._move_out_of_buffer(p)
            elif p.ds_tensor.status.name == "NOT_AVAILABLE":
                missing.append(p)
        if len(missing) > swapper.available_swap_in_buffers():
            prefetched = [self._parameters[i] for i in swapper.param_id_to_buffer_id]
            swapper.remove_partition_and_release_buffers(prefetched)
        at_once = swapper.param_buffer_count
        for first in range(0, len(missing), at_once):
            swapper.swap_in(missing[first : first + at_once], async_op=False)
            for p in missing[first : first + at_once]:
                self._move_out_of_buffer(p)

    def _move_out_of_buffer(self, parameter: Any) -> None:
        share, available = parameter.ds_tensor.data.clone(), parameter.ds_tensor.status
        self._swapper.remove_partition_and_release_buffers([parameter])
        parameter.ds_tensor.data, parameter.ds_tensor.status = share, available
