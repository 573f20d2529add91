"""Judges for portraits that no model here was trained with: who it is, and the perceived gender. Writes net files.

    npm pack @vladmandic/face-api@1.7.15
    python tests/face_nets.py --package vladmandic-face-api-1.7.15.tgz --output FOLDER

writes FOLDER/identity.pt2 and FOLDER/gender.pt2 for `jobs.evaluate --identity-net … --classifier …`. They take
CelebA's images as `jobs.prepare celeba` makes them, the centre 178 of the frame at any side, and cut out what each
was trained on. Ported from face-api (MIT; the weights of the identity net, dlib's, are CC0).
"""

import argparse
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IDENTITY_BOX = (38.4 / 178, 61.3 / 178, 139.3 / 178, 162.2 / 178)
GENDER_BOX = (35 / 178, 45 / 178, 143 / 178, 153 / 178)
"""x0 y0 x1 y1 in shares of the centre 178 x 178: the crop decides everything."""
WHOLE = (0.0, 0.0, 1.0, 1.0)
GENDERS = ("male", "female")
"""The order of the gender net's logits in the package."""
MEAN = (122.782, 117.001, 104.298)


def weights(package: Path, name: str) -> dict[str, Tensor]:
    """A model's tensors by their names, filters as PyTorch has them (out, in, height, width)."""
    with tarfile.open(package) as archive:

        def read(suffix: str) -> bytes:
            member = archive.extractfile(f"package/model/{name}{suffix}")
            assert member is not None
            return member.read()

        groups, data = json.loads(read("-weights_manifest.json")), read(".bin")
    found, offset = {}, 0
    for entry in (entry for group in groups for entry in group["weights"]):
        count, packing = int(np.prod(entry["shape"])), entry.get("quantization")
        raw = np.frombuffer(data, np.uint8 if packing else np.float32, count, offset).astype(np.float32)
        offset += count if packing else 4 * count
        tensor = torch.from_numpy(raw * packing["scale"] + packing["min"] if packing else raw).reshape(entry["shape"])
        if tensor.ndim == 4:  # depthwise filters are h w in 1, which PyTorch has as in 1 h w
            tensor = tensor.permute(2, 3, 0, 1) if "depthwise" in entry["name"] else tensor.permute(3, 2, 0, 1)
        found[entry["name"]] = tensor.contiguous().float()
    assert offset == len(data)
    return found


class Face(nn.Module):
    """What the two nets share: weights by name, the crop, the colours."""

    def __init__(self, tensors: dict[str, Tensor], box: tuple[float, ...], side: int) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name.replace("/", "_"), tensor)
        x0, y0, x1, y1 = box
        steps = (torch.arange(side) + 0.5) / side
        rows, columns = 2 * (y0 + (y1 - y0) * steps) - 1, 2 * (x0 + (x1 - x0) * steps) - 1
        self.register_buffer("grid", torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[None])
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])

    def face(self, images: Tensor) -> Tensor:
        """The box of uint8 b 3 h w at the net's side; bilinear, as faces this small are enlarged."""
        grid = self.grid.expand(images.shape[0], -1, -1, -1)
        cut = F.grid_sample(images.float(), grid, align_corners=False, padding_mode="border")
        return (cut - self.mean) / 255

    def conv(self, x: Tensor, name: str, **options: int) -> Tensor:
        return F.conv2d(x, getattr(self, f"{name}_filters"), getattr(self, f"{name}_bias"), **options)


class Identity(Face):
    """dlib's face recognition net: images to 128 numbers; nearer than 0.6 is the same person."""

    def __init__(self, tensors: dict[str, Tensor], box: tuple[float, ...] = IDENTITY_BOX) -> None:
        super().__init__(tensors, box, 150)

    def scaled(self, x: Tensor, name: str, **options: int) -> Tensor:
        x = self.conv(x, f"{name}_conv", **options)
        gain, bias = (getattr(self, f"{name}_scale_{part}") for part in ("weights", "biases"))
        return x * gain[:, None, None] + bias[:, None, None]

    def block(self, x: Tensor, name: str, down: bool) -> Tensor:
        h = self.scaled(x, f"{name}_conv1", **({"stride": 2} if down else {"padding": 1})).relu()
        h = self.scaled(h, f"{name}_conv2", padding=1)
        if down:
            x = F.avg_pool2d(x, 2)
            x = F.pad(x, (0, 0, 0, 0, 0, h.shape[1] - x.shape[1]))
            h = F.pad(h, (0, x.shape[3] - h.shape[3], 0, x.shape[2] - h.shape[2]))
        return (h + x).relu()

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.scaled(self.face(images), "conv32_down", stride=2).relu(), 3, 2)
        for width, count in ((32, 3), (64, 3), (128, 2), (256, 2)):
            if width > 32:
                x = self.block(x, f"conv{width}_down", True)
            for number in range(1, count + 1):
                x = self.block(x, f"conv{width}_{number}", False)
        return self.block(x, "conv256_down_out", True).mean((2, 3)) @ self.fc


class Gender(Face):
    """face-api's small Xception net: images to a logit of each of `domains`, male and female in any order."""

    def __init__(
        self, tensors: dict[str, Tensor], box: tuple[float, ...] = GENDER_BOX, domains: tuple[str, ...] = GENDERS
    ) -> None:
        super().__init__(tensors, box, 112)
        self.order = [GENDERS.index(name) for name in domains]

    def separable(self, x: Tensor, name: str) -> Tensor:
        x = F.conv2d(x, getattr(self, f"{name}_depthwise_filter"), padding=1, groups=x.shape[1])
        return F.conv2d(x, getattr(self, f"{name}_pointwise_filter"), getattr(self, f"{name}_bias"))

    def block(self, x: Tensor, name: str, *, relu: bool = True) -> Tensor:
        h = self.separable(x.relu() if relu else x, f"{name}_separable_conv0")
        h = self.separable(h.relu(), f"{name}_separable_conv1")
        if name.startswith("middle"):
            return x + self.separable(h.relu(), f"{name}_separable_conv2")
        # TensorFlow's SAME at an even side: the odd row and column go to the bottom and right.
        h = F.max_pool2d(F.pad(h, (0, 1, 0, 1), value=-torch.inf), 3, 2)
        return h + self.conv(x, f"{name}_expansion_conv", stride=2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(F.pad(self.face(images), (0, 1, 0, 1)), "entry_flow_conv_in", stride=2).relu()
        x = self.block(x, "entry_flow_reduction_block_0", relu=False)
        x = self.block(x, "entry_flow_reduction_block_1")
        x = self.block(self.block(x, "middle_flow_main_block_0"), "middle_flow_main_block_1")
        x = self.block(x, "exit_flow_reduction_block")
        x = self.separable(x, "exit_flow_separable_conv").relu().mean((2, 3))
        return (x @ self.fc_gender_weights + self.fc_gender_bias)[:, self.order]


def write(net: nn.Module, path: Path, *, image_size: int = 64) -> None:
    """A torch.export file for any number and side of images, tried on images of `image_size`."""
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    example = torch.zeros(2, 3, 50, 60, dtype=torch.uint8)
    torch.export.save(torch.export.export(net.eval(), (example,), dynamic_shapes=(sizes,)), path)
    probe = torch.randint(0, 256, (1, 3, image_size, image_size), dtype=torch.uint8)
    torch.testing.assert_close(torch.export.load(path).module()(probe), net(probe), atol=1e-4, rtol=1e-4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="the .tgz of @vladmandic/face-api 1.7.15")
    parser.add_argument("--output", type=Path, required=True, help="folder for identity.pt2 and gender.pt2")
    parser.add_argument("--image-size", type=int, default=64, help="side of the images the files are tried on")
    parser.add_argument("--domains", nargs=2, choices=GENDERS, default=GENDERS, help="the order of the logits")
    args = parser.parse_args()
    if not args.package.exists():
        print(f"{args.package} is not there: npm pack @vladmandic/face-api@1.7.15", file=sys.stderr)
        return 2
    if set(args.domains) != set(GENDERS):
        print(f"--domains is {' '.join(args.domains)}; give male and female once each", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    nets = {
        "identity": Identity(weights(args.package, "face_recognition_model")),
        "gender": Gender(weights(args.package, "age_gender_model"), domains=tuple(args.domains)),
    }
    for name, net in nets.items():
        write(net, args.output / f"{name}.pt2", image_size=args.image_size)
        print(args.output / f"{name}.pt2")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
