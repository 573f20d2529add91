"""CelebA as it is distributed: aligned faces and text files about them.

    img_align_celeba/, img_align_celeba_png/ or img_align_celeba.zip    the images (or they lie directly in SOURCE)
    list_attr_celeba.txt | .csv                  needed: 40 attributes an image, -1 or 1
    list_eval_partition.txt | .csv               the official split: 0, 1, 2 or train, val, test
    identity_CelebA.txt                          who is who
    list_landmarks_align_celeba.txt | .csv       eyes, nose and mouth, for finding better matches

in SOURCE or anywhere below it, or all of it in a zip file (Kaggle's archive.zip). There are no true pairs of one person
as woman and man: `--pairing matched` takes the image of the other domain, in the same split, that differs in the fewest
of the attributes that do not go with the domain (and, where they are known, has the most similar pose and identity;
jobs/datasets/matching.py weighs them). Such pairs are proxies.
"""

import codecs
import dataclasses
import difflib
import itertools
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from ddpm_core import checkpoint, images, storage
from ddpm_core.errors import InputError
from jobs.common.progress import Progress
from jobs.datasets import decode, matching
from jobs.datasets.archive import Archive
from jobs.datasets.decode import File, Pixels
from jobs.datasets.format import SPLITS, DatasetCard, IndexRow, Row
from jobs.datasets.layout import SPLIT_WORDS
from jobs.datasets.listing import PACKED, image_files, list_images, parts
from jobs.datasets.options import CelebA
from jobs.datasets.source import (
    Draft,
    Made,
    fingerprint,
    name_hash,
    prepared_by,
    rows_there,
    source_folder,
    split_names,
    weed,
)

LICENCE = "CelebA: non-commercial research only"
IMAGES, IMAGES_PNG, IN_THE_WILD = "img_align_celeba", "img_align_celeba_png", "img_celeba"
ATTRIBUTES, PARTITION = "list_attr_celeba", "list_eval_partition"
IDENTITY, LANDMARKS = "identity_CelebA", "list_landmarks_align_celeba"
WIDTH, HEIGHT = 178, 218
"""Of the aligned images that landmarks refer to."""
CENTRE = np.array([WIDTH // 2, HEIGHT // 2] * 5)
MARGIN = 100
"""Landmarks may lie outside of the image by this much, in pixels."""
MAX_TABLE_BYTES, MAX_LINE, MAX_LINES = 100_000_000, 4096, 1_000_000
"""Of a table: CelebA's have 27 MB at most, lines of 200 letters, and one for each of 202,599 images."""
LINES_AT_ONCE = 1000
"""Lines of a table that are text cells at a time: Python's strings take twenty times the room of the numbers."""


@dataclasses.dataclass(frozen=True)
class Table:
    """One of CelebA's text files."""

    uri: str
    columns: tuple[str, ...]
    rows: dict[str, np.ndarray]
    """Image to its int32 values."""


@dataclasses.dataclass(frozen=True)
class Face:
    """What the text files say about one image."""

    name: str
    uri: str
    domain: int
    split: str
    attributes: np.ndarray
    identity: int | None
    landmarks: np.ndarray | None
    """x y of five points, pixels of the aligned image."""


def draft(options: CelebA) -> Draft:
    """Raises InputError where files, columns, the attribute or the images are missing or do not fit."""
    _check_matching(options)
    source, sizes, unread = _files(options)
    encoder = _encoder(options)
    attributes = _table(source, sizes, ATTRIBUTES, header=True)
    if attributes is None:
        raise InputError(f"--source {source}: no list_attr_celeba.txt or .csv there; it comes with CelebA's images")
    others = {
        name: _table(source, sizes, name, header=header)
        for name, header in {PARTITION: False, IDENTITY: False, LANDMARKS: True}.items()
    }
    column = _attribute(attributes, options.domain_attribute)
    _check_landmarks(others[LANDMARKS])
    photos = _photos(source, sizes)
    there = rows_there(options)
    unread = {_stem(path): reason for path, reason in unread.items() if _stem(path) not in photos}
    opened = {file.partition("!")[0] for file in sizes if "!" in file}
    packed = [file for file in sizes if file.lower().endswith((*PACKED, ".7z.001")) and file not in opened]
    hint = f"; {packed[0]} is packed: unpack it" if packed else ""
    faces, rejected, notes = _faces(attributes, column, others, photos, unread, hint, options, there)
    card = DatasetCard(
        name="celeba",
        licence=LICENCE,
        source="CelebA, aligned and cropped (Liu et al. 2015), the user's own copy",
        image_size=options.image_size,
        encoding=options.encoding,
        domains=domain_names(options.domain_attribute),
        pairing=options.pairing,
        attribute_names=attributes.columns,
        prepared_by=prepared_by("celeba", dataclasses.replace(options, identity_encoder=encoder)),
        source_hash=fingerprint(sizes),
    )
    return Draft(card=card, make=lambda: _make(faces, rejected, notes, column, options, there))


def _check_matching(options: CelebA) -> None:
    """Raises InputError for options of matching that cannot work or have no effect."""
    if options.pairing != "matched" and options.identity_encoder is not None:
        raise InputError(f"--identity-encoder has no effect with --pairing {options.pairing}; leave it out")


def _encoder(options: CelebA) -> str | None:
    """Hash of the identity encoder's files, that tells one from another wherever it lies; None without one.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if options.identity_encoder is None:
        return None
    uri = storage.absolute(options.identity_encoder, flag="--identity-encoder")
    try:
        matching.load_encoder(uri)
    except InputError as error:
        raise InputError(f"--identity-encoder {error}") from None
    folder, _ = checkpoint.resolve(uri)
    files = ("config.json", "model.safetensors")
    return fingerprint(*(storage.read_bytes(storage.join(folder, file)) for file in files))


def domain_names(attribute: str) -> tuple[str, str]:
    """Names of the domains without and with the attribute."""
    return ("female", "male") if attribute == "Male" else (f"not_{attribute.lower()}", attribute.lower())


# ------------------------------------------------------------------------------------------- files


def _files(options: CelebA) -> tuple[str, dict[str, int], dict[str, str]]:
    """The folder, the size of each file below it, and what cannot be read there with the reason.

    What zip files hold is archive.zip!path, where the lists or the images are packed; `--source` may be one itself.

    Raises:
        InputError: there is no such folder, or a zip file is damaged.
    """
    source = storage.absolute(options.source, flag="--source") if options.source else ""
    if source.endswith(".zip") and storage.is_file(source):
        folder, _, file = source.rpartition("/")
        sizes, unread = {file: storage.num_bytes(source)}, {}
    else:
        folder = source_folder(options, "the folder that holds CelebA's images and list_attr_celeba.txt")
        listing = list_images(folder)
        sizes, unread = listing.sizes, listing.rejected
    zips = sorted(file for file in sizes if file.endswith(".zip"))
    if any(posixpath.basename(file).startswith(ATTRIBUTES) for file in sizes):
        unpacked = any({IMAGES, IMAGES_PNG}.intersection(parts(file)[:-1]) for file in image_files(sizes))
        zips = [file for file in zips if not unpacked and posixpath.basename(file) == f"{IMAGES}.zip"]
    for file in zips:
        sizes |= {f"{file}!{member}": size for member, size in Archive(storage.join(folder, file)).sizes().items()}
    return folder, sizes, unread


# ------------------------------------------------------------------------------------------- text files


def _table(source: str, sizes: Mapping[str, int], stem: str, *, header: bool) -> Table | None:
    wanted = [f"{stem}.txt", f"{stem}.csv"]
    found = [file for file in sizes if parts(file)[-1] in wanted]
    if not found:
        return None
    best = min(found, key=lambda file: (wanted.index(parts(file)[-1]), file.count("/"), file))
    uri = storage.join(source, best)
    content = decode.read_or_error(uri, max_bytes=MAX_TABLE_BYTES)
    if isinstance(content, InputError):
        raise InputError(f"{uri}: {content}")
    words = {word: SPLITS.index(split) for word, split in SPLIT_WORDS.items()} if stem == PARTITION else {}
    return parse_table(content, uri, header=header, words=words)


def parse_table(content: bytes, uri: str, *, header: bool, words: Mapping[str, int] = {}) -> Table:
    """One of CelebA's files: the official text (a count line and names where `header`), or comma-separated.

    `words`: what may stand for a number.

    Raises:
        InputError: naming the file and the line.
    """
    if content.count(b"\n") + content.count(b"\r") > 2 * MAX_LINES:
        raise InputError(f"{uri} has more lines than CelebA has images; download it again")
    try:
        lines = [line.decode() for line in content.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{uri} is not a text file; download it again") from None
    if any(len(line) > MAX_LINE for line in lines):
        raise InputError(f"{uri} has lines of more than {MAX_LINE} letters; download it again")
    comma = uri.endswith(".csv")
    count = None
    columns: list[str] = []
    start = 0
    if comma:
        columns = [name.strip() for name in lines[0].split(",")] if lines else []
        if "image_id" not in columns:
            raise InputError(f"{uri}: column 'image_id' is missing; it has {', '.join(columns[:5]) or 'nothing'}")
        if columns[0] != "image_id":
            raise InputError(f"{uri}: column 'image_id' must be the first, that is {columns[0]!r}")
        columns, start = columns[1:], 1
    elif header:
        if len(lines) < 2 or not lines[0].strip().isdecimal():
            raise InputError(f"{uri}: the first line must be the number of images, the second the names of columns")
        count, columns, start = int(lines[0]), lines[1].split(), 2
    width = len(columns) or 1
    names: list[str] = []
    values: list[np.ndarray] = []
    for some in range(start, len(lines), LINES_AT_ONCE):
        cells = [_cells(line, comma) for line in lines[some : some + LINES_AT_ONCE]]
        for number, record in enumerate(cells, some + 1):
            if len(record) != width + 1:
                raise InputError(f"{uri} line {number}: {len(record) - 1} values where {width} are expected")
        names += [record[0] for record in cells]
        values.append(_values([record[1:] for record in cells], words, f"{uri} line", some + 1))
    if count is not None and count != len(names):
        raise InputError(f"{uri} announces {count} images and lists {len(names)}; it is cut off or edited")
    rows = dict(zip(names, itertools.chain.from_iterable(values), strict=True))
    if len(rows) != len(names):
        raise InputError(f"{uri} lists an image twice; download it again")
    return Table(uri, tuple(columns), rows)


def _values(cells: Sequence[Sequence[str]], words: Mapping[str, int], where: str, first: int) -> np.ndarray:
    """Raises InputError with the number of the line whose value is no whole number and none of the words."""
    try:
        if max(map(len, itertools.chain.from_iterable(cells)), default=0) > 20:  # no number, and costly in an array
            raise ValueError
        return np.array(cells).astype(np.int32)
    except (ValueError, OverflowError):
        known = [[words.get(cell.casefold(), cell) for cell in record] for record in cells]
    for number, record in enumerate(known, first):
        for cell in record:
            if not isinstance(cell, int) and not re.fullmatch(r"[-+]?\d{1,9}", cell):
                raise InputError(f"{where} {number}: {cell[:80]!r} is not a whole number")
    return np.array([[int(cell) for cell in record] for record in known], np.int32)


def _cells(line: str, comma: bool) -> list[str]:
    return [cell.strip() for cell in line.split(",")] if comma else line.split()


def _attribute(table: Table, name: str) -> int:
    """Column of the attribute that makes the domains."""
    if name not in table.columns:
        lower = {column.lower(): column for column in table.columns}
        near = difflib.get_close_matches(name.lower(), lower, n=1)
        hint = f"did you mean {lower[near[0]]}? " if near else ""
        raise InputError(f"--domain-attribute {name}: {hint}{table.uri} has {', '.join(table.columns)}")
    column = table.columns.index(name)
    sides = {int(values[column]) for values in table.rows.values()}
    if not sides <= {-1, 1}:
        raise InputError(f"{table.uri}: column {name!r} holds {sorted(sides - {-1, 1})[0]}; it must hold -1 and 1")
    values = np.stack(list(table.rows.values())) if table.rows else np.zeros((0, len(table.columns)))
    for row, other in np.argwhere(np.abs(values) > 1)[:1].tolist():
        name, value = list(table.rows)[row], int(values[row, other])
        raise InputError(f"{table.uri}: {name} has {value} as {table.columns[other]}; it must be -1 or 1")
    return column


def _check_landmarks(table: Table | None) -> None:
    """Raises InputError for landmarks that cannot be of an aligned image."""
    if table is None:
        return
    if len(table.columns) != len(CENTRE):
        raise InputError(f"{table.uri} has {len(table.columns)} columns; x and y of five points are expected")
    offset = np.abs(np.stack(list(table.rows.values())) - CENTRE) if table.rows else np.zeros((0, len(CENTRE)))
    wrong = np.flatnonzero((offset > CENTRE + MARGIN).any(axis=1))
    if len(wrong):
        name = list(table.rows)[wrong[0]]
        raise InputError(f"{table.uri}: {name} has landmarks far outside of its {WIDTH} x {HEIGHT} pixels")


# --------------------------------------------------------------------------------------------- images


def _photos(source: str, sizes: Mapping[str, int]) -> dict[str, str]:
    """URI of each image by its name without ending."""
    files = image_files(sizes)
    packed = [file for file in files if "!" in file]
    plain = [file for file in files if "!" not in file]
    for some in (plain, packed):
        for folder in (IMAGES, IMAGES_PNG):
            if inside := [file for file in some if folder in parts(file)[:-1]]:
                return {_stem(file): storage.join(source, file) for file in inside}
    # Those in the wild are not aligned.
    others = [file for file in packed or plain if IN_THE_WILD not in parts(file)[:-1]]
    return {_stem(file): storage.join(source, file) for file in others}


def _stem(file: str) -> str:
    """A file's name without its ending, or its endings: 000001.jpg.jpg is what Windows makes of 000001.jpg."""
    name = parts(file)[-1]
    while posixpath.splitext(name)[1].lower() in images.SUFFIXES:
        name = posixpath.splitext(name)[0]
    return name


def _faces(
    attributes: Table,
    column: int,
    others: Mapping[str, Table | None],
    photos: Mapping[str, str],
    unread: Mapping[str, str],
    packed: str,
    options: CelebA,
    there: Mapping[str, IndexRow],
) -> tuple[list[Face], list[tuple[str, str]], list[str]]:
    """Images that are there, with what is known of them, sorted by name; those that cannot be used; notes."""
    names = [name for name in attributes.rows if _stem(name) in photos]
    if not names:
        first = f"; {min(unread)}: {unread[min(unread)]}" if unread else packed
        raise InputError(
            f"--source {options.source}: none of the {len(attributes.rows):,} images that {attributes.uri} lists "
            f"is there; copy img_align_celeba.zip, or what is in it, into the folder{first}"
        )
    notes = []
    rejected = [(name, unread[_stem(name)]) for name in attributes.rows if _stem(name) in unread]
    if missing := len(attributes.rows) - len(names) - len(rejected):
        notes.append(f"{missing:,} of the images that {ATTRIBUTES} lists are not there")
    if options.limit is not None:
        names = sorted(names, key=lambda name: (name_hash(name), name))[: options.limit]
    identities, landmarks = others[IDENTITY], others[LANDMARKS]
    splits, how = _splits(sorted(names), others[PARTITION], identities, there)
    notes.append(how)
    if not splits:
        raise InputError(
            f"{PARTITION} lists none of the {len(names):,} images ({names[0]} is one); names must be those of "
            f"{attributes.uri}, or leave {PARTITION} out"
        )
    for what, table in (("identity", identities), ("landmarks", landmarks)):
        if table is not None and (missing := sum(name not in table.rows for name in splits)):
            notes.append(f"{what} of {missing:,} images unknown: {posixpath.basename(table.uri)} does not list them")
    faces = []
    for name in sorted(splits):
        points = None if landmarks is None else landmarks.rows.get(name)
        faces.append(
            Face(
                name=name,
                uri=photos[_stem(name)],
                domain=int(attributes.rows[name][column] > 0),
                split=splits[name],
                attributes=attributes.rows[name].astype(np.int8),
                identity=int(identities.rows[name][0]) if identities and name in identities.rows else None,
                landmarks=points,
            )
        )
    _check_identities(faces)
    rejected += [(name, f"not listed in {PARTITION}") for name in sorted(set(names) - set(splits))]
    return faces, rejected, notes


def _splits(
    names: Sequence[str], partition: Table | None, identities: Table | None, there: Mapping[str, IndexRow]
) -> tuple[dict[str, str], str]:
    """Split of each image, and how it was found; people of an earlier version keep theirs."""
    known = {} if identities is None else identities.rows
    people = {name: str(known[name][0]) if name in known else name for name in names}
    kept = {name if row.identity is None else str(row.identity): row.split for name, row in there.items()}
    if partition is not None:
        wrong = sorted({int(values[0]) for values in partition.rows.values()} - {0, 1, 2})
        if wrong:
            raise InputError(f"{partition.uri}: split {wrong[0]} is unknown; 0 is train, 1 val, 2 test")
        splits = {name: SPLITS[partition.rows[name][0]] for name in names if name in partition.rows}
        return {name: kept.get(people[name], split) for name, split in splits.items()}, "official split"
    by_person = split_names(people.values(), kept=kept)
    splits = {name: by_person[person] for name, person in people.items()}
    if identities is not None:
        return splits, "split by identity, 80/10/10"
    return splits, "split by hash of the name, 80/10/10: without identity_CelebA.txt a person may be in two splits"


def _check_identities(faces: Sequence[Face]) -> None:
    seen: dict[int, str] = {}
    for face in faces:
        if face.identity is not None and seen.setdefault(face.identity, face.split) != face.split:
            raise InputError(
                f"{IDENTITY}.txt and {PARTITION} do not fit: person {face.identity} is in {seen[face.identity]} and in "
                f"{face.split}; take both from the same release, or leave one out"
            )


# --------------------------------------------------------------------------------------------- matching


def match_faces(
    faces: Sequence[Face], embeddings: np.ndarray | None, column: int, options: CelebA
) -> tuple[np.ndarray, list[str]]:
    """(n,) index of each face's counterpart in `faces`, and how good the matches are, in words.

    `embeddings`: (n, e) int8, `matching.quantised`.

    Raises:
        InputError: a split lacks one of the domains.
    """
    others = np.delete(np.stack([face.attributes for face in faces]), column, axis=1)
    domain, split = np.array([face.domain for face in faces]), np.array([face.split for face in faces])
    points = [face.landmarks - CENTRE for face in faces if face.landmarks is not None]
    traits = matching.Traits(
        attributes=others[:, correlation(others, domain) < options.match_correlation],
        landmarks=np.stack(points) if len(points) == len(faces) else None,
        embeddings=embeddings,
    )
    vectors = traits.vectors()
    names = [face.name for face in faces]
    target = np.full(len(faces), -1)
    with Progress(total=len(faces), description="match") as progress:
        for here, there in _sides(split, domain, options.domain_attribute):
            keys = [f"{options.seed}/{names[row]}" for row in here.tolist()]
            target[here] = there[matching.match(vectors[here], vectors[there], keys, progress.update)]
    return target, matching.report(traits, others, target, names)


def _sides(split: np.ndarray, domain: np.ndarray, attribute: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of the images to match and of their candidates: each split in both directions."""
    for name in sorted(set(split.tolist())):
        without, having = (np.flatnonzero((split == name) & (domain == side)) for side in (0, 1))
        if not len(without) or not len(having):
            raise InputError(
                f"split {name} has {len(without)} images without {attribute} and {len(having)} with it; "
                "matching needs both: give more images, or --pairing unpaired"
            )
        yield without, having
        yield having, without


def correlation(attributes: Int[np.ndarray, "n a"], domain: Int[np.ndarray, " n"]) -> np.ndarray:
    """(a,) absolute correlation of each attribute with the domain; 0 where one of them is constant."""
    x, y = attributes.astype(np.float32), (domain - domain.mean()).astype(np.float32)
    # y has mean 0, so x need not: no third array of 200,000 x 39
    scale = np.sqrt(x.var(axis=0) * len(x) * (y**2).sum())
    return np.abs(y @ x) / np.where(scale > 0, scale, np.inf)


# ------------------------------------------------------------------------------------------------- rows


def _make(
    faces: Sequence[Face],
    unsplit: Sequence[tuple[str, str]],
    notes: Sequence[str],
    column: int,
    options: CelebA,
    there: Mapping[str, IndexRow],
) -> Made:
    files = [File(face.name, face.uri) for face in faces]
    pixels, rejected = decode.decode_images(files, size=options.image_size, halves=False, encoding=options.encoding)
    names = [face.name for face in faces]
    copies, dropped, word = weed(
        pixels, names, [face.split for face in faces], options, known=[name in there for name in names]
    )
    usable = [face for face, ok in zip(faces, pixels.ok, strict=True) if ok]
    where = np.flatnonzero(pixels.ok)
    target: np.ndarray | None = None
    notes = [*notes, *pixels.notes(), word]
    if options.pairing == "matched":
        target, quality = match_faces(usable, _embeddings(pixels, where, options), column, options)
        notes += quality
    return Made(
        rows={split: _rows(usable, where, pixels, split, target, options.image_size) for split in SPLITS},
        num_rows=len(usable),
        rejected=sorted([*rejected, *dropped, *unsplit]),
        notes=notes,
        copies=copies,
    )


def _embeddings(pixels: Pixels, where: np.ndarray, options: CelebA) -> np.ndarray | None:
    """(n, e) int8 of the images at these places, None where no encoder is given."""
    if options.identity_encoder is None:
        return None
    uri = storage.absolute(options.identity_encoder, flag="--identity-encoder")
    with Progress(total=len(where), description="embed") as progress:
        return matching.embed(lambda row: pixels[int(where[row]), 0], len(where), uri, progress.update)


def _rows(
    faces: Sequence[Face], where: np.ndarray, pixels: Pixels, split: str, target: np.ndarray | None, size: int
) -> Iterator[Row]:
    for number, face in enumerate(faces):
        if face.split != split:
            continue
        other = None if target is None else int(target[number])
        yield Row(
            id=face.name,
            domain=face.domain,
            image=pixels[int(where[number]), 0],
            target=None if other is None else pixels[int(where[other]), 0],
            target_id=None if other is None else faces[other].name,
            identity=face.identity,
            attributes=face.attributes.tolist(),
            landmarks=None if face.landmarks is None else stored_landmarks(face.landmarks, size),
        )


def stored_landmarks(points: np.ndarray, size: int) -> list[float]:
    """Landmarks of an aligned image (178 x 218) in pixels of its centred square of `size`."""
    xy = points.reshape(-1, 2).astype(np.float64)
    side = min(WIDTH, HEIGHT)
    offset = ((WIDTH - side) // 2, (HEIGHT - side) // 2)
    return ((xy - offset) * (size / side)).ravel().tolist()
