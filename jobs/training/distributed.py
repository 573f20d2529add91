"""One network over several workers: each a copy (DDP), or each a part of it (FSDP2), for networks that do not fit.

Checkpoints are the same either way: `gathered` makes sharded tensors whole, `shard` takes whole ones.
"""

from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ddpm_core.unet import Block


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def joined(mine: torch.Tensor, rows: int) -> torch.Tensor:
    """All workers' parts of a batch of so many rows, in order; gradients flow into `mine` alone. All must call it."""
    world = world_size()
    if world == 1:
        return mine
    sizes = [(rank + 1) * rows // world - rank * rows // world for rank in range(world)]  # batches.Share
    padded = F.pad(mine.detach(), (0, 0) * (mine.ndim - 1) + (0, max(sizes) - len(mine)))
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)  # gloo's takes tensors of one shape only
    parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    parts[torch.distributed.get_rank()] = mine
    return torch.cat(parts)


def shard(network: nn.Module, device: torch.device) -> None:
    """Leave this worker its part of each weight, in place; all workers must call it. A block's weights are brought
    together when it is computed, and dropped again."""
    mesh = init_device_mesh(device.type, (world_size(),))
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in [module for module in network.modules() if isinstance(module, Block)]:
        fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)


def gathered(state: Any) -> Any:
    """A state dict with every sharded tensor whole, on the CPU; all workers must call it."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    return [gathered(value) for value in state] if isinstance(state, list) else state


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Take up the whole state of an optimizer, whose weights may be sharded here."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    like_weights = {
        index: {
            name: _like(weights[index], value) if value.shape == weights[index].shape else value
            for name, value in of_weight.items()
        }
        for index, of_weight in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": like_weights})


def _like(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` split and laid out as `weight` is: fused optimizers go through both as they lie in memory."""
    if isinstance(weight, DTensor):
        return distribute_tensor(value.to(weight.device).contiguous(), weight.device_mesh, weight.placements)
    return torch.empty_like(weight, requires_grad=False).copy_(value)
