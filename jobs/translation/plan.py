"""What one translation is to do: its command, checked, before Ray starts."""

import dataclasses
import os
import re
from typing import Any

from ddpm_core import faces, images, keyed_mark, nets, storage
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.config import SamplingConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import check_tiles
from jobs.common import kinds, numbers
from jobs.datasets.format import DatasetCard, find_card
from jobs.translation import listing, tables
from jobs.translation.listing import Sources
from jobs.translation.opening import by_flags, open_checkpoint
from jobs.translation.options import GuidanceNets, TranslateArgs

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "parquet": ""}


@dataclasses.dataclass(frozen=True)
class TranslationJob:
    """Everything one command has made up its mind about before Ray starts."""

    args: TranslateArgs
    loaded: Checkpoint
    sampling: SamplingConfig
    guides: GuidanceNets
    card: DatasetCard | None
    """The input's card where it is a data set."""
    options: dict[str, Any]
    """What the results depend on; a folder holds results of one such set only."""
    template: tuple[float, ...]
    """Landmarks that faces are aligned to; () where images are taken as they are."""
    sources: Sources
    """The images."""
    mark_key: bytes = dataclasses.field(default=b"", repr=False)
    """Of the results' invisible mark; b"" for none."""
    max_rejected: tuple[float, bool] | None = None
    """How many images may be set aside, and whether that is a share of them."""

    @property
    def suffix(self) -> str:
        """Of the results' files; "" where each is a row of one."""
        return SUFFIXES[self.args.output_format]


def plan_translation(args: TranslateArgs) -> TranslationJob:
    """All checks that cost little, before anything is started or written.

    Raises:
        InputError: whatever is wrong with the command, in one line.
    """
    args = dataclasses.replace(
        args,
        checkpoint=storage.absolute(args.checkpoint, flag="--checkpoint"),
        input=storage.absolute(args.input, flag="--input"),
        output=storage.absolute(args.output, flag="--output"),
    )
    numbers.check(args)
    kinds.check_output(args.output, "translation", {"--input": args.input})
    opened = open_checkpoint(args.checkpoint, args.domain, args.sampling, ema=args.ema, guides=args.guides)
    loaded, sampling = opened.loaded, opened.sampling
    options = {
        "input": args.input,
        "domain": args.domain,
        "seed": args.seed,
        **opened.options,
    }
    if args.identity_net is not None:
        net = storage.absolute(args.identity_net, flag="--identity-net")
        check_identity_net(net, opened.guides.identity_guidance)
        args = dataclasses.replace(args, identity_net=net)
    mark_key = keyed_mark.read_key(args.mark_key, flag="--mark-key")
    if mark_key:
        options |= {"mark_key": keyed_mark.name_of(mark_key)}
    check_image_name(args.output)
    card = None if storage.is_file(args.input) else find_card(args.input)
    for flag, given in {"--align faces": args.framing.align, "--faces all": args.framing.faces}.items():
        if card is not None and flag.endswith(f" {given}"):
            raise InputError(f"{flag} has no effect on a data set, whose images are cut already; leave it out")
    template = () if card is not None else faces.template_of(loaded.config.data.landmarks, args.framing)
    if template:
        options |= {"align": "faces"} | ({"faces": "all"} if args.framing.faces == "all" else {})
    if args.tiles:
        if card is not None or template or args.framing.output_size == "model":
            raise InputError(
                "--tiles is for scenes at their own size, not for a data set, faces (--align none) or --output-size "
                "model; leave it out"
            )
        try:
            check_tiles(loaded.config, sampling)
        except InputError as error:
            raise InputError(by_flags(str(error))) from None
        if led := [name for name in ("classifier_guidance", "identity_guidance") if getattr(opened.guides, name)]:
            raise InputError(f"--tiles does not go with --{led[0].replace('_', '-')}, which judges whole images")
        options |= {"tiles": True}
    if card is None and args.framing.output_size == "own":  # a data set's squares are of the model's size
        options |= {"output_size": "own"}
    if card is not None:
        listing.check_dataset(args.input, card, loaded.config)
        sources = listing.dataset(args.input, card, args.split, args.domain)
        options |= {"split": args.split, "content_hash": card.content_hash}
    else:
        sources = tables.find(args.input)
    if args.output_format != "png":
        options |= {"output_format": args.output_format}
    most = read_most(args.max_rejected)
    listing.check_any(sources)
    return TranslationJob(args, loaded, sampling, opened.guides, card, options, template, sources, mark_key, most)


def check_identity_net(uri: str, leads: str | None) -> None:
    """Raises InputError where there is no such net, or its weights are those of the net that `leads` the sampling."""
    try:
        net = nets.identity_net(uri)
    except InputError as error:
        raise InputError(f"--identity-net: {error}") from None
    if leads and nets.identity_net(leads).fingerprint == net.fingerprint:
        raise InputError("--identity-net is the encoder of --identity-guidance and would judge its own work")


def read_most(given: str | None) -> tuple[float, bool] | None:
    """--max-rejected as a number, and whether it is a share.

    Raises:
        InputError: it is neither a number of images nor a share of them.
    """
    if given is None:
        return None
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)%", given):
        if float(found[1]) < 100:
            return float(found[1]) / 100, True
    elif re.fullmatch(r"\d+", given):
        return int(given), False
    raise InputError(f"--max-rejected is {given}; give a number of images, or a share below 100 % such as 1%")


def check_image_name(output: str) -> None:
    """Raises InputError where a folder would be called as an image: results of one image lie in a folder too."""
    if os.path.splitext(output)[1].lower() in images.SUFFIXES:
        raise InputError(f"--output {output} is called as an image; give a folder, in which the results are to lie")
