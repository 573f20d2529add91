"""What the tests share: one Ray cluster a session, one S3 server a session, small real pictures."""

import os

os.environ.update(
    OMP_NUM_THREADS="1",  # networks this small lose by threads
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="60",
    RAY_TRAIN_COLLECTIVE_TIMEOUT_S="60",
    RAY_DATA_USE_DATASOURCE_V2="0",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_TRAIN_METRICS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    AWS_EC2_METADATA_DISABLED="true",
)  # before ray is imported

import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for the session: four logical CPUs, so that Train workers never take all of them from Ray Data."""
    import logging

    import ray
    import ray.data

    port = free_port()
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: Ray puts unix sockets below it
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=True,
        dashboard_port=port,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=folder,
        runtime_env={
            "env_vars": {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}", "PYTHONPATH": str(ROOT)}
        },
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().use_datasource_v2 = False
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny network with random weights, as a checkpoint: day and night at 16 px, two steps."""
    import torch

    from ddpm_core import checkpoint
    from ddpm_core.config import ModelConfig, SamplingConfig, UNetConfig
    from ddpm_core.unet import UNet

    config = ModelConfig(
        image_size=16,
        domains=("day", "night"),
        unet=UNetConfig(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attn_resolutions=(16,),
            condition_channels=32,
        ),
        sampling=SamplingConfig(num_steps=2),
    )
    torch.manual_seed(0)
    model = UNet(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the zero-initialised branches too: every part takes part
            parameter.add_(0.02 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("checkpoint")
    for name, data in checkpoint.files(model.state_dict(), config).items():
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small paired data set: 48 gradients of 16 px by day, dimmed and blue by night."""
    import numpy as np

    from jobs import data

    def rows(split: str, count: int) -> Iterator[data.Row]:
        random = np.random.default_rng(len(split))
        ramp = np.linspace(0, 1, 16)
        for i in range(count):
            corners = random.uniform(0, 255, (2, 2, 3))
            day = np.einsum("y,x,c->yxc", 1 - ramp, 1 - ramp, corners[0, 0]) + np.einsum(
                "y,x,c->yxc", ramp, ramp, corners[1, 1]
            )
            night = (day * [0.2, 0.3, 0.5]).astype(np.uint8)
            yield data.Row(
                id=f"{split}-{i:03d}", domain=0, image=day.astype(np.uint8), target=night, target_id=f"{split}-{i:03d}"
            )

    folder = str(tmp_path_factory.mktemp("data") / "gradients")
    card = data.DatasetCard(
        name="gradients",
        licence="CC0",
        source="drawn by the tests",
        image_size=16,
        encoding="raw",
        domains=("day", "night"),
        pairing="paired",
    )
    data.write_dataset(folder, {"train": rows("train", 32), "val": rows("val", 8), "test": rows("test", 8)}, card)
    return folder
