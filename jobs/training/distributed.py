"""One network over several workers: each a copy (DDP), or each a part of it (FSDP2), for networks that do not fit.

Checkpoints are the same either way: `gathered` makes sharded tensors whole, `shard` takes whole ones.
"""

import contextlib
import fcntl
import os
import socket
import struct
from typing import Any

import ray.train.torch
import ray.util
import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ddpm_core.unet import Block


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


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


class Torch(ray.train.torch.TorchConfig):
    """Ray's, but gloo listens where Ray says that this node is. By itself it takes the address that the machine's name
    has, on many machines 127.0.1.1, where no other node finds it."""

    @property
    def backend_cls(self) -> Any:
        return Backend


class Backend(ray.train.torch.TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


def name_interface() -> None:
    """Tell gloo by which interface the others reach this worker, unless the user has."""
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


SIOCGIFADDR = 0x8915
"""Linux: the address of an interface. Elsewhere gloo is left alone."""
