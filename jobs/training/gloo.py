"""Where gloo, the CPU workers' collectives, listens."""

import contextlib
import fcntl
import os
import socket
import struct
from typing import Any

import ray.train.torch
import ray.util

SIOCGIFADDR = 0x8915
"""Linux: the address of an interface. Elsewhere gloo is left alone."""


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
