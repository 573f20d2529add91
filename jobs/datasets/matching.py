"""Counterparts for images that have none: the most similar image of the other domain.

    queries      (n, d) float32   the images to be matched, one vector each, every number an integer
    candidates   (m, d) float32   the images of the other domain
    cost         squared distance of two vectors:
                 ATTRIBUTE^2 * 4 for each attribute that differs, LANDMARK^2 for each px^2 between landmarks,
                 2 * IDENTITY^2 * (1 - cosine) for embeddings

All sums stay below 2^24, so float32 holds them exactly: the nearest are the same on every machine, and ties are ties.
The search is exhaustive (faiss). 100,000 x 100,000 vectors of 40 numbers (attributes and landmarks) take 14 CPU seconds
on a core of an EPYC, with an embedding of 128 more 35; a graph (HNSW, 32 links, efSearch 64) takes 18 and 36 with its
building and finds the nearest of 100 and 98.8 % only.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow
import ray
import ray.data
from jaxtyping import Float32, Int, Int8, Int64, UInt8
from ray.data.extensions import ArrowTensorArray

from ddpm_core import storage
from jobs.common import cli
from jobs.datasets import source

if TYPE_CHECKING:
    from ddpm_core.encoders import IdentityEncoder

ATTRIBUTE, LANDMARK, IDENTITY = 30, 3, 127
"""Scale of an attribute (-1 or 1), of a landmark (px) and of an embedding (length 1). So an attribute that differs
weighs as much as 400 px^2 between the landmarks (9 px at each of five), and as a cosine that is lower by 0.11."""
LARGEST_SUM = 2**24
"""Integers up to here are exact in float32."""
QUERIES_PER_TASK = 4096
"""Queries that one Ray task matches: faiss's own block."""
LANES = 8
"""Vectors are filled up with zeros to a multiple of this length; others take faiss three times as long."""
NEAREST = 32
"""Candidates looked at for ties; where all of them tie, all candidates are."""
IMAGES_PER_TASK = 256
"""Images that one Ray task embeds."""
WINDOW_BYTES = 64 * 2**20
"""Pixels that wait in Ray's object store to be embedded, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What images are compared by, one row an image."""

    attributes: Int[np.ndarray, "n a"]
    """-1 or 1."""
    landmarks: Int[np.ndarray, "n p"] | None = None
    """Pixels, x and y in turn, from about the middle of the image."""
    embeddings: Int8[np.ndarray, "n e"] | None = None
    """`quantised`."""

    def vectors(self) -> Float32[np.ndarray, "n d"]:
        """Vectors whose squared distance is the cost."""
        columns = [self.attributes.astype(np.float32) * ATTRIBUTE]
        if self.landmarks is not None:
            columns.append(self.landmarks.astype(np.float32) * LANDMARK)
        if self.embeddings is not None:
            columns.append(self.embeddings.astype(np.float32))
        width = sum(column.shape[1] for column in columns)
        columns.append(np.zeros((len(columns[0]), -width % LANES), np.float32))
        vectors = np.concatenate(columns, axis=1)
        # |x - y|^2 is computed as |x|^2 + |y|^2 - 2 x.y: no partial sum is larger than 4 max |x|^2.
        assert not len(vectors) or 4 * (vectors.astype(np.float64) ** 2).sum(axis=1).max() < LARGEST_SUM
        return vectors


def quantised(embeddings: Float32[np.ndarray, "n e"]) -> Int8[np.ndarray, "n e"]:
    """Embeddings of length 1 as integers."""
    return np.round(embeddings * IDENTITY).astype(np.int8)


# ------------------------------------------------------------------------------------------------ search


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Candidates with equal vectors taken together, so that ties of any number cost nothing."""

    vectors: Float32[np.ndarray, "u d"]
    """The distinct vectors."""
    norms: Float32[np.ndarray, " u"]
    """Their squared lengths."""
    starts: Int64[np.ndarray, " u_1"]
    """Where each one's candidates begin in `members`, and the end of all."""
    members: Int64[np.ndarray, " m"]
    """Indices of the candidates, those of one vector in ascending order."""

    @classmethod
    def of(cls, vectors: Float32[np.ndarray, "m d"]) -> "Candidates":
        distinct, which, counts = np.unique(vectors, axis=0, return_inverse=True, return_counts=True)
        starts = np.concatenate([[0], np.cumsum(counts)])
        return cls(distinct, (distinct**2).sum(axis=1), starts, np.argsort(which.ravel(), kind="stable"))

    def pick(self, tied: Int64[np.ndarray, " t"], draw: int) -> int:
        """One of the candidates that have one of these vectors, each as likely as the others."""
        ends = np.cumsum(self.starts[tied + 1] - self.starts[tied])
        number = draw % int(ends[-1])
        group = int(np.searchsorted(ends, number, side="right"))
        return int(self.members[self.starts[tied[group] + 1] - (ends[group] - number)])


def match(
    queries: Float32[np.ndarray, "n d"],
    candidates: Float32[np.ndarray, "m d"],
    keys: Sequence[str],
    on_rows: Callable[[int], None] = lambda count: None,
) -> Int64[np.ndarray, " n"]:
    """For each query the candidate at the smallest cost; the hash of its key decides between equal ones.

    Ray Data spreads the queries over its CPUs; the candidates go into the object store once. `on_rows` hears how many
    more queries are done.
    """
    out = np.empty(len(queries), np.int64)
    tables = [
        pyarrow.table(
            {
                "row": pyarrow.array(range(start, min(start + QUERIES_PER_TASK, len(queries))), pyarrow.int64()),
                "key": list(keys[start : start + QUERIES_PER_TASK]),
                "query": ArrowTensorArray.from_numpy(queries[start : start + QUERIES_PER_TASK]),
            }
        )
        for start in range(0, len(queries), QUERIES_PER_TASK)
    ]
    with cli.ray_session():
        matched = ray.data.from_arrow(tables).map_batches(
            match_batch,
            batch_size=None,
            batch_format="numpy",
            fn_kwargs={"candidates": ray.put(Candidates.of(candidates))},
        )
        for batch in matched.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
            out[batch["row"]] = batch["match"]
            on_rows(len(batch["row"]))
    return out


def match_batch(batch: dict[str, np.ndarray], candidates: "ray.ObjectRef[Candidates]") -> dict[str, np.ndarray]:
    """One task's queries: row and matched candidate."""
    found = nearest(batch["query"], ray.get(candidates), batch["key"].tolist())
    return {"row": batch["row"], "match": found}


def nearest(
    queries: Float32[np.ndarray, "n d"], candidates: Candidates, keys: Sequence[str]
) -> Int64[np.ndarray, " n"]:
    """`match` in this process."""
    import faiss  # not at the top: every worker that decodes images would load it

    distinct, which = np.unique(queries, axis=0, return_inverse=True)
    distances, rows = faiss.knn(distinct, candidates.vectors, min(NEAREST, len(candidates.vectors)))
    ties = [np.sort(row[cost == cost[0]]) for cost, row in zip(distances, rows, strict=True)]
    for query, tied in enumerate(ties):
        if len(tied) == NEAREST < len(candidates.vectors):
            costs = candidates.norms - 2 * (candidates.vectors @ distinct[query])
            ties[query] = np.flatnonzero(costs == costs.min())
    draws = (int.from_bytes(source.name_hash(key), "big") for key in keys)
    return np.array([candidates.pick(ties[q], draw) for q, draw in zip(which.ravel(), draws, strict=True)], np.int64)


# -------------------------------------------------------------------------------------------- embeddings


def embed(
    pictures: Callable[[int], UInt8[np.ndarray, "s s 3"]],
    num_pictures: int,
    encoder: str,
    on_rows: Callable[[int], None] = lambda count: None,
) -> Int8[np.ndarray, "n e"]:
    """Quantised identity embeddings of images 0 … num_pictures - 1 by the encoder at that URI, by Ray Data."""
    out: np.ndarray | None = None
    with cli.ray_session():
        for window in _windows(pictures, num_pictures):
            embedded = ray.data.from_arrow(window).map_batches(
                embed_batch, batch_size=None, batch_format="numpy", fn_kwargs={"encoder": encoder}
            )
            for batch in embedded.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
                if out is None:
                    out = np.empty((num_pictures, batch["embedding"].shape[1]), np.int8)
                out[batch["row"]] = batch["embedding"]
                on_rows(len(batch["row"]))
    assert out is not None, "no image"
    return out


def _windows(pictures: Callable[[int], np.ndarray], num_pictures: int) -> Iterator[list[pyarrow.Table]]:
    """All images in tables of IMAGES_PER_TASK, as many at a time as WINDOW_BYTES hold."""
    tables: list[pyarrow.Table] = []
    for start in range(0, num_pictures, IMAGES_PER_TASK):
        rows = range(start, min(start + IMAGES_PER_TASK, num_pictures))
        pixels = np.stack([pictures(row) for row in rows])
        tables.append(
            pyarrow.table({"row": pyarrow.array(rows, pyarrow.int64()), "pixels": ArrowTensorArray.from_numpy(pixels)})
        )
        if len(tables) * pixels.nbytes >= WINDOW_BYTES:
            yield tables
            tables = []
    if tables:
        yield tables


def embed_batch(batch: dict[str, np.ndarray], encoder: str) -> dict[str, np.ndarray]:
    """One task's images: row and quantised embedding."""
    import torch

    from ddpm_core import images

    with torch.inference_mode():
        embeddings = load_encoder(encoder)(images.to_tensor(batch["pixels"]))
    return {"row": batch["row"], "embedding": quantised(embeddings.numpy())}


@functools.lru_cache(maxsize=1)
def load_encoder(uri: str) -> "IdentityEncoder":
    """The identity encoder, once a process.

    Raises:
        InputError: there is none, or it is damaged.
    """
    from ddpm_core import encoders  # not at the top: every worker that decodes images would load it

    return encoders.load_identity_encoder(uri, read=storage.read_bytes)


# --------------------------------------------------------------------------------------------- quality


def report(
    traits: Traits, others: Int[np.ndarray, "n b"], target: Int64[np.ndarray, " n"], names: Sequence[str]
) -> list[str]:
    """How good the matches are, in words.

    `target`: index of each image's match. `others`: all attributes but the domain's, of which `traits` has some.
    """
    compared, differing = _differing(traits.attributes, target), _differing(others, target)
    what = f"{traits.attributes.shape[1]} of {others.shape[1]} attributes"
    words = [
        f"of those {compared.mean():.2f} differ on average, of all {differing.mean():.2f} (at most {differing.max()})"
    ]
    apart = np.zeros(len(target))
    if traits.landmarks is not None:
        gap = (traits.landmarks - traits.landmarks[target]).reshape(len(target), -1, 2)
        apart = np.sqrt((gap**2).sum(axis=2)).mean(axis=1)
        what += ", landmarks"
        words.append(f"landmarks lie {apart.mean():.1f} px apart")
    if traits.embeddings is not None:
        what += ", identity"
        words.append(f"the cosine of embeddings is {cosines(traits.embeddings, target).mean():.2f}")
    uses = np.bincount(target, minlength=len(target))
    words.append(f"an image serves as match for up to {uses.max()} others, {(uses == 0).mean():.0%} for none")
    worst = np.lexsort((apart, compared))[:-4:-1]
    pairs = ", ".join(f"{names[row]} with {names[target[row]]}" for row in worst.tolist())
    return [f"matched by {what}: {'; '.join(words)}", f"worst matches: {pairs}"]


def _differing(attributes: np.ndarray, target: np.ndarray) -> Int64[np.ndarray, " n"]:
    return (attributes != attributes[target]).sum(axis=1)


def cosines(embeddings: Int8[np.ndarray, "n e"], target: Int64[np.ndarray, " n"]) -> np.ndarray:
    """(n,) cosine of each embedding and that of its match."""
    one = embeddings.astype(np.float32)
    one /= np.linalg.norm(one, axis=1, keepdims=True)
    return (one * one[target]).sum(axis=1)
