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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int, Int8, Int64, UInt8

from jobs.common import workers
from jobs.datasets import source

if TYPE_CHECKING:
    from ddpm_core.encoders import IdentityEncoder

ATTRIBUTE, LANDMARK, IDENTITY = 30, 3, 127
"""Scale of an attribute (-1 or 1), of a landmark (px) and of an embedding (length 1). So an attribute that differs
weighs as much as 400 px^2 between the landmarks (9 px at each of five), and as a cosine that is lower by 0.11."""
LARGEST_SUM = 2**24
"""Integers up to here are exact in float32."""
QUERIES_PER_TASK = 4096
"""Queries that one task matches: faiss's own block."""
LANES = 8
"""Vectors are filled up with zeros to a multiple of this length; others take faiss three times as long."""
NEAREST = 32
"""Candidates looked at for ties; where all of them tie, all candidates are."""
IMAGES_PER_TASK = 256
"""Images that one task embeds."""


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

    `on_rows` hears how many more queries are done.
    """
    out = np.empty(len(queries), np.int64)
    tasks = [slice(start, start + QUERIES_PER_TASK) for start in range(0, len(queries), QUERIES_PER_TASK)]
    search = functools.partial(match_task, candidates=Candidates.of(candidates))
    given = ((task, queries[task], keys[task]) for task in tasks)
    for task, found in workers.mapped(search, given, len(tasks)):
        out[task] = found
        on_rows(len(found))
    return out


def match_task(
    task: tuple[slice, Float32[np.ndarray, "n d"], Sequence[str]], *, candidates: Candidates
) -> tuple[slice, Int64[np.ndarray, " n"]]:
    """One task's (rows, queries, keys): rows and matched candidates."""
    return task[0], nearest(task[1], candidates, task[2])


def nearest(
    queries: Float32[np.ndarray, "n d"], candidates: Candidates, keys: Sequence[str]
) -> Int64[np.ndarray, " n"]:
    """`match` of a few."""
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
    image: Callable[[int], UInt8[np.ndarray, "s s 3"]],
    num_images: int,
    encoder: str,
    on_rows: Callable[[int], None] = lambda count: None,
) -> Int8[np.ndarray, "n e"]:
    """Quantised identity embeddings of images 0 … num_images - 1 by the encoder at that URI."""
    starts = range(0, num_images, IMAGES_PER_TASK)
    tasks = (
        (start, np.stack([image(row) for row in range(start, min(start + IMAGES_PER_TASK, num_images))]))
        for start in starts
    )
    parts: dict[int, np.ndarray] = {}
    for start, embeddings in workers.mapped(functools.partial(embed_task, encoder=encoder), tasks, len(starts)):
        parts[start] = embeddings
        on_rows(len(embeddings))
    return np.concatenate([parts[start] for start in starts])


def embed_task(task: tuple[int, UInt8[np.ndarray, "n s s 3"]], *, encoder: str) -> tuple[int, Int8[np.ndarray, "n e"]]:
    """One task's (first row, images): first row and quantised embeddings."""
    import torch

    from ddpm_core import images

    torch.set_num_threads(1)  # tasks run side by side, and the last bits depend on it
    with torch.inference_mode():
        embeddings = load_encoder(encoder)(images.to_tensor(task[1]))
    return task[0], quantised(embeddings.numpy())


@functools.lru_cache(maxsize=1)
def load_encoder(uri: str) -> "IdentityEncoder":
    """The identity encoder, once a process.

    Raises:
        InputError: there is none, or it is damaged.
    """
    from ddpm_core import encoders  # not at the top: every worker that decodes images would load it

    return encoders.load_identity_encoder(uri)


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
