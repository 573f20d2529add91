"""The mission's questions as a plan: what is prepared, trained and measured, and what each section is to show.

    rendered portraits    female → male: every person has an exact counterpart
    rendered landscapes   day → night: likewise
    earth                 day → night, real, registered to the pixel
    faces                 CelebA, where there is a copy: real, without counterparts; trends only

Judges (who is it, which side does it show) are encoders trained on people and places that no model has seen.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ddpm_core import config as configs
from ddpm_core.errors import InputError
from jobs.suite.plan import Claim, Command, Figure, Measured, Plan, Section

Flags = tuple[str, ...]
ALONE = ("--num-workers", "0")
"""No command needs Ray itself: many run at a time, each in one process."""
WEIGHTS = (1.0, 1.5, 2.5)
"""Of guidance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large everything is; seconds are of one core, or of one GPU, and only for the estimate."""

    image_size: int
    num_portraits: int
    num_landscapes: int
    earth: Flags
    """What else its trainings are given."""
    epochs: int
    earth_epochs: int
    face_epochs: int
    encoder_epochs: int
    num_images: int
    """Held-out images of each measurement."""
    num_grid_images: int
    """Of each point of the grid of guidance weights, steps and samplers."""
    num_train: int
    """Training images among which the nearest one to each result is looked for."""
    num_diverse: int
    """Images that are drawn with several seeds."""
    num_steps: int
    train_s: float
    evaluate_s: float
    network: Flags
    """The network and its training, the same in every diffusion run but for what a row names."""
    learning_rate: float
    mask: Flags
    """What brings the source's own pixels to the output, where a row does not say otherwise."""
    identity_encoder: Flags
    judge: Flags
    gan: Flags
    gan_epochs: dict[str, int]
    """Such that a training takes about as long as the diffusion model's."""
    cyclegan: Flags = ()
    """What the one with two generators is given besides."""
    grid_weights: tuple[float, ...] = WEIGHTS
    grid_steps: tuple[int, ...] = (3, 10, 25)


_SMALL = (
    *(
        "--preset",
        "demo",
        "--unet.patch-size",
        "2",
        "--unet.model-channels",
        "64",
        "--unet.channel-mult",
        "1",
        "2",
        "2",
    ),
    *("--unet.attn-resolutions", "16", "8", "--unet.head-channels", "32", "--unet.anchor-channels", "24"),
    *("--unet.condition-channels", "48"),
    *("--diffusion.loss-weighting", "uniform", "--diffusion.p-uncond", "0.2"),
    # Not the demo's chain of as many steps as it samples with: numbers of steps are compared.
    *("--diffusion.num-timesteps", "1000", "--diffusion.schedule", "linear"),
    *("--sampling.num-steps", "25", "--sampling.guidance-scale", "1", "--sampling.guidance-interval", "0", "1"),
    *("--sampling.guidance-rescale", "0"),
)
_DARK = ("--diffusion.loss-weighting", "snr", "--diffusion.max-snr", "100")
"""Lights are small, and nights so dark that all else is hardly an error (docs/log.md)."""
SIZES = {
    "smoke": Size(
        image_size=32,
        num_portraits=240,
        num_landscapes=240,
        earth=("--max-train-images", "64"),
        epochs=1,
        earth_epochs=1,
        face_epochs=1,
        encoder_epochs=2,
        num_images=20,
        num_grid_images=20,
        grid_weights=(1.5,),
        grid_steps=(2, 4),
        num_train=20,
        num_diverse=4,
        num_steps=2,
        train_s=6,
        evaluate_s=8,
        network=("--preset", "smoke"),
        learning_rate=1e-3,
        mask=(),
        identity_encoder=("--encoder.widths", "8", "16"),
        judge=("--encoder.widths", "8", "16"),
        gan=("--preset", "smoke"),
        gan_epochs={"pix2pix": 1, "cyclegan": 1},
    ),
    "cpu": Size(
        image_size=32,
        num_portraits=4000,
        num_landscapes=3000,
        earth=_DARK,
        epochs=6,
        earth_epochs=4,
        face_epochs=24,
        encoder_epochs=16,
        num_images=200,
        num_grid_images=96,
        num_train=512,
        num_diverse=16,
        num_steps=10,
        train_s=120,
        evaluate_s=25,
        network=_SMALL,
        learning_rate=1e-3,
        mask=("--unet.source-mask",),
        identity_encoder=(),
        judge=("--encoder.widths", "32", "64", "96", "192"),
        gan=("--preset", "demo-pix2pix"),
        gan_epochs={"pix2pix": 6, "cyclegan": 2},
        cyclegan=("--gan.channels", "32"),
    ),
    "gpu": Size(
        image_size=64,
        num_portraits=40_000,
        num_landscapes=20_000,
        earth=_DARK,
        epochs=30,
        earth_epochs=60,
        face_epochs=54,
        encoder_epochs=20,
        num_images=2048,
        num_grid_images=512,
        num_train=2048,
        num_diverse=32,
        num_steps=25,
        train_s=900,
        evaluate_s=60,
        network=(
            *("--preset", "celeba-64", "--optim.lr-schedule", "cosine"),
            *("--diffusion.prediction", "x_0", "--global-batch-size", "128"),
        ),
        learning_rate=3e-4,
        mask=("--unet.source-mask",),
        identity_encoder=(),
        judge=("--encoder.widths", "32", "64", "96", "192"),
        gan=("--preset", "demo-pix2pix", "--global-batch-size", "64"),
        gan_epochs={"pix2pix": 60, "cyclegan": 15},
    ),
}
GUIDANCE = 1.5
"""The weight that the headline rows are measured with."""
CONFIDENT_FLIPS, SAME_PERSON = 0.95, 0.90


def mission(
    *,
    size: str,
    seeds: int = 3,
    sections: Sequence[str] = (),
    celeba: str | None = None,
    snapshots: str | None = None,
    judges: str | None = None,
) -> Plan:
    """The plan; `sections` names some of SECTIONS, by default all that there are data for.

    Raises:
        InputError: no such section, or one without its data.
    """
    plan = _Planning(SIZES[size], seeds, celeba, snapshots, judges)
    for name in sections:
        if name not in SECTIONS:
            raise InputError(f"--sections {name}{configs.did_you_mean(name, SECTIONS)}: {', '.join(SECTIONS)}")
    if "stress" in sections and snapshots is None:
        raise InputError("--sections stress needs your own photographs; give --snapshots FOLDER")
    wanted = sections or [name for name in SECTIONS if name != "stress" or snapshots is not None]
    made = tuple(SECTIONS[name](plan) for name in SECTIONS if name in wanted)
    return Plan(name="mission", size=size, commands=tuple(plan.commands.values()), sections=made)


class _Planning:
    """Commands as sections ask for them: each is there once, whoever asks."""

    def __init__(self, size: Size, seeds: int, celeba: str | None, snapshots: str | None, judges: str | None) -> None:
        self.size, self.seeds = size, seeds
        self.celeba, self.snapshots, self.judges = celeba, snapshots, judges
        self.commands: dict[str, Command] = {}

    def add(self, command: Command) -> str:
        """The command's key."""
        return self.commands.setdefault(command.key, command).key

    # -- data --------------------------------------------------------------------------------------------------

    def data(self, name: str) -> str:
        """The data set's key."""
        size = self.size
        side = ("--image-size", str(size.image_size))
        drawn = {
            "portraits": ("portraits", size.num_portraits, 0),
            "landscapes": ("landscapes", size.num_landscapes, 0),
            "people": ("portraits", size.num_portraits, 1),
            "places": ("landscapes", size.num_landscapes, 1),
        }
        argv: Flags
        if name in drawn:
            scene, count, seed = drawn[name]
            argv = ("rendered", "--scene", scene, "--count", str(count), "--seed", str(seed), *side)
        elif name == "earth":
            argv = ("earth", *side)
        else:
            assert self.celeba is not None
            argv = ("celeba", "--source", self.celeba, *side)
        argv = (*argv, "--output", "{out}")
        return self.add(Command(key=f"data/{name}", module="jobs.prepare", argv=argv, how=ALONE, cost=40))

    # -- trainings ---------------------------------------------------------------------------------------------

    def train(self, key: str, data: str, *flags: str, cost: float) -> str:
        argv = ("--data", f"{{{self.data(data)}}}", "--output", "{out}", "--num-workers", "0", *flags)
        return self.add(Command(key=key, module="jobs.train", argv=argv, cost=cost))

    def encoder(self, name: str, data: str, *flags: str) -> str:
        """The encoder's key. All look at images as large as the data's."""
        size = self.size
        side = ("--encoder.image-size", str(size.image_size), "--epochs", str(size.encoder_epochs))
        return self.train(f"encoders/{name}", data, *_last(*side, *flags), cost=size.train_s / 4)

    def judge_identity(self, data: str) -> str | None:
        """Who is it? None where nobody can say: of places, and of faces without the user's net."""
        if data == "faces":
            return None if self.judges is None else f"{self.judges}/identity.pt2"
        if data != "portraits":
            return None
        flags = (*self.size.identity_encoder, *self.size.judge, "--seed", "1")
        return f"{{{self.encoder('judge-identity', 'people', '--preset', 'identity-encoder', *flags)}}}"

    def judge_domain(self, data: str) -> str:
        """Which side does it show?"""
        if data == "faces" and self.judges is not None:
            return f"{self.judges}/gender.pt2"
        seen = {"portraits": "people", "landscapes": "places"}.get(data, data)
        flags = ("--preset", "attribute-classifier", *self.size.judge, "--seed", "1")
        return f"{{{self.encoder(f'judge-{data}', seen, *flags)}}}"

    def trained_identity(self) -> str:
        """The encoder of the identity loss."""
        flags = ("--preset", "identity-encoder", *self.size.identity_encoder)
        return f"{{{self.encoder('identity', 'portraits', *flags)}}}"

    def guide(self) -> str:
        """The classifier that leads sampling: it knows noise."""
        flags = (
            "--preset",
            "attribute-classifier",
            "--encoder.noise-aware",
            "--epochs",
            str(2 * self.size.encoder_epochs),
        )
        return f"{{{self.encoder('guide', 'portraits', *flags)}}}"

    def runs(
        self, name: str, data: str, *flags: str, seeds: int | None = None, mask: bool = True, cost: float = 1.0
    ) -> tuple[str, ...]:
        """Keys of the diffusion trainings of one kind, one a seed; `cost` in plain trainings."""
        size = self.size
        epochs = {"earth": size.earth_epochs, "faces": size.face_epochs}.get(data, size.epochs)
        own = ("--epochs", str(epochs), "--optim.learning-rate", str(size.learning_rate))
        more = size.earth if data == "earth" else size.mask if mask else ()  # nothing of a day is there by night
        return self._runs(name, data, *size.network, *own, *more, *flags, seeds=seeds, cost=cost)

    def bare(self, injection: str) -> tuple[str, ...]:
        """Keys of the trainings without a mask: what reaches the output must go through the network."""
        how = ("--unet.injection", *INJECTIONS[injection])
        return self.runs(f"{injection}-bare", "portraits", *how, mask=False, cost=1.2)

    def gan(self, method: str) -> tuple[str, ...]:
        """Keys of the trainings of a baseline, one a seed."""
        size = self.size
        more = ("--epochs", str(size.gan_epochs[method]), *(size.cyclegan if method == "cyclegan" else ()))
        return self._runs(method, "portraits", *size.gan, "--method", method, *more, seeds=None, cost=1.0)

    def _runs(self, name: str, data: str, *flags: str, seeds: int | None, cost: float) -> tuple[str, ...]:
        size, common = self.size, ("--target-domain", DIRECTIONS[data][1])
        words = _last(*common, *flags)
        return tuple(
            self.train(f"runs/{data}-{name}/seed-{seed}", data, *words, "--seed", str(seed), cost=cost * size.train_s)
            for seed in range(self.seeds if seeds is None else min(seeds, self.seeds))
        )

    # -- measurements ------------------------------------------------------------------------------------------

    def measure(
        self, name: str, runs: tuple[str, ...], *flags: str, num_images: int | None = None, on: str | None = None
    ) -> Measured:
        """How these runs do, sampled by these flags; `name` is the row's."""
        size = self.size
        training = runs[0].split("/")[1]
        data = on or training.split("-")[0]
        steps = ("--num-steps", str(size.num_steps)) if not training.endswith(("pix2pix", "cyclegan")) else ()
        judges: Flags = ("--classifier", self.judge_domain(data))
        if (identity := self.judge_identity(data)) is not None:
            judges = (*judges, "--identity-net", identity)
        keys = []
        for run in runs:
            flagged = "".join(f"-{word.strip('-')}" if word.startswith("--") else f"_{word}" for word in flags)
            count = "" if num_images is None else f"-{num_images}"
            key = f"evaluations/{training}{_slug(flagged)}{count}/{run.rpartition('/')[2]}"
            argv = (
                *("--checkpoint", f"{{{run}}}", "--data", f"{{{self.data(data)}}}", "--output", "{out}"),
                *("--domain", DIRECTIONS[data][1], "--num-images", str(num_images or size.num_images)),
                *("--num-workers", "0", "--num-train", str(size.num_train), "--num-diverse", str(size.num_diverse)),
                *judges,
                *_last(*steps, *flags),
            )
            keys.append(self.add(Command(key=key, module="jobs.evaluate", argv=argv, cost=size.evaluate_s)))
        return Measured(name=name, evaluations=tuple(keys), training=training)


DIRECTIONS = {
    "portraits": ("female", "male"),
    "landscapes": ("day", "night"),
    "earth": ("day", "night"),
    "faces": ("female", "male"),
}
"""From which side to which each data set is translated."""
INJECTIONS = {
    "concat": ("concat",),
    "cross-attention": ("concat", "cross_attention"),
    "anchor": ("concat", "anchor"),
}
"""How the condition gets in, besides the skip connections that always attend to it."""


def _last(*flags: str) -> Flags:
    """Flags of which the last one of a name holds."""
    found: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            name = word
            found[name] = []
        else:
            found[name].append(word)
    return tuple(word for name, values in found.items() for word in (name, *values))


def _slug(text: str) -> str:
    """Of flags, as a part of a folder's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in text)[:80]


# -- sections ---------------------------------------------------------------------------------------------------------


def injection(plan: _Planning) -> Section:
    paired, unpaired = plan.runs("paired", "portraits"), plan.runs("unpaired", "portraits", "--pairing", "unpaired")
    ours, drawn, mission = (
        f"paired, guidance {GUIDANCE}",
        f"paired, no mask, guidance {GUIDANCE}",
        "unpaired, no guidance",
    )
    rows = [
        plan.measure(mission, unpaired, "--guidance-scale", "1.0"),
        plan.measure(f"unpaired, guidance {GUIDANCE}", unpaired, "--guidance-scale", str(GUIDANCE)),
        plan.measure("paired, no guidance", paired, "--guidance-scale", "1.0"),
        plan.measure(ours, paired, "--guidance-scale", str(GUIDANCE)),
        plan.measure("paired, no mask, no guidance", plan.bare("concat"), "--guidance-scale", "1.0"),
        plan.measure(drawn, plan.bare("concat"), "--guidance-scale", str(GUIDANCE)),
    ]
    blind = "a network that is shown any image of the other side draws somebody of the wanted sex, whoever was shown"
    claims = [
        claim
        for row in (ours, drawn)
        for claim in (
            _claim("beats unpaired without guidance in flips", "flip_rate", row, mission, reason=blind),
            _claim("beats unpaired without guidance in faithfulness", "psnr", row, mission),
            _claim("beats unpaired without guidance in keeping the person", "identity_rank_1", row, mission),
            _claim("turns the sex of nearly everybody", "flip_rate", row, kind="at_least", threshold=CONFIDENT_FLIPS),
            _claim("keeps the person", "identity_rank_1", row, kind="at_least", threshold=SAME_PERSON),
        )
    ]
    plain = rows[-2].name
    claims += [
        _claim("turns the sex of nearly everybody", "flip_rate", plain, kind="at_least", threshold=CONFIDENT_FLIPS),
        _claim("keeps the person", "identity_rank_1", plain, kind="at_least", threshold=SAME_PERSON),
    ]
    figures: tuple[Figure, ...] = (
        Figure(kind="images", title="The same people by each way of training and sampling"),
        Figure(kind="bars", title="Faithfulness", y="psnr"),
        Figure(kind="bars", title="Is it the same person?", y="identity_rank_1"),
    )
    if plan.celeba is not None:
        matched = plan.runs("matched", "faces", seeds=1)
        alone = plan.runs("unpaired", "faces", "--pairing", "unpaired", seeds=1)
        rows += [
            plan.measure("real faces: unpaired, no guidance", alone, "--guidance-scale", "1.0"),
            plan.measure(f"real faces: matched, guidance {GUIDANCE}", matched, "--guidance-scale", str(GUIDANCE)),
        ]
        figures = (*figures, Figure(kind="images", title="Real faces", rows=tuple(row.name for row in rows[-2:])))
    return Section(
        key="injection",
        title="Injection and pairing",
        question="Does a network learn to keep the person from true pairs, or from two pools of images?",
        rows=tuple(rows),
        metrics=PORTRAITS,
        claims=tuple(claims),
        figures=tuple(_shown(figure, rows[:6], "portraits") for figure in figures),
        notes=(
            "unpaired: the condition is any image of the other side, as in the mission's baseline. "
            "Some of what a man looks like (beard, hairline) is not in the woman's image, so PSNR has a limit.",
            "no mask: the network draws all of the image. With one it says what stays of each pixel.",
        ),
    )


def day2night(plan: _Planning) -> Section:
    rows, claims, figures = [], [], []
    for data, title in {"landscapes": "drawn landscapes", "earth": "the Earth"}.items():
        runs = plan.runs("paired", data)
        here = [plan.measure(f"{title}, guidance {w:g}", runs, "--guidance-scale", str(w)) for w in WEIGHTS]
        rows += here
        for metric, what in {"kid": "in KID", "psnr": "in faithfulness"}.items():
            claims.append(_claim(f"beats none {what}", metric, here[1].name, here[0].name, "night"))
        names = tuple(row.name for row in here)
        figures += [
            Figure(kind="images", title=f"{title}, by guidance weight", rows=names, domain="night"),
            Figure(kind="bars", title=f"{title}: distance to real nights", rows=names, y="kid", domain="night"),
        ]
    return Section(
        key="day2night",
        title="Day to night, with and without guidance",
        question="The same networks, the same noise, the same steps: what does the guidance weight change?",
        rows=tuple(rows),
        metrics=("psnr", "ssim", "perceptual", "kid", "flip_rate", "neighbor_distance", "copied", "nfe"),
        claims=tuple(claims),
        figures=tuple(figures),
        notes=(f"The weight that is compared with none, {GUIDANCE:g}, was fixed before anything was measured.",),
    )


def gans(plan: _Planning) -> Section:
    paired = plan.runs("paired", "portraits")
    ours, drawn = "diffusion, paired", "diffusion, paired, no mask"
    rows = [
        plan.measure(ours, paired, "--guidance-scale", "1.0"),
        plan.measure(drawn, plan.bare("concat"), "--guidance-scale", "1.0"),
        *(plan.measure(name, plan.gan(name.lower())) for name in ("pix2pix", "CycleGAN")),
    ]
    claims = [
        _claim(f"beats {theirs} in {what}", metric, row, theirs)
        for row in (ours, drawn)
        for theirs in ("pix2pix", "CycleGAN")
        for metric, what in WON.items()
    ]
    return Section(
        key="gans",
        title="Against GANs",
        question="Does the diffusion model beat the conditional GANs at equal training compute?",
        rows=tuple(rows),
        metrics=(*PORTRAITS, "images_per_s"),
        claims=tuple(claims),
        figures=tuple(
            _shown(figure, rows, "portraits")
            for figure in (
                Figure(kind="images", title="The same people by each method"),
                Figure(kind="bars", title="Distance to real images", y="kid"),
                Figure(kind="bars", title="Faithfulness", y="psnr"),
            )
        ),
        notes=(
            "Passes over the training images were chosen so that each training takes about as long: see its seconds.",
        ),
    )


def problems(plan: _Planning) -> Section:
    guided = ("--guidance-scale", str(GUIDANCE))
    ways = {name: plan.bare(name) for name in INJECTIONS}
    rows = [plan.measure(f"{name}, no mask", runs, "--guidance-scale", "1.0") for name, runs in ways.items()]
    concat, cross, anchor = (row.name for row in rows)
    paired = plan.runs("paired", "portraits")
    rows.append(plan.measure(f"paired, guidance {GUIDANCE:g}", paired, *guided))
    masked = rows[-1].name
    claims = [
        _claim(f"beats concat in {what}", metric, ours, concat)
        for ours in (cross, anchor)
        for metric, what in WON.items()
    ]
    loss = ("--identity-encoder", plan.trained_identity(), "--identity-weight", str(IDENTITY_WEIGHT))
    unpaired = plan.runs("unpaired", "portraits", "--pairing", "unpaired")
    kept = plan.runs("unpaired-identity", "portraits", "--pairing", "unpaired", *loss, cost=1.2)
    paired_kept = plan.runs("paired-identity", "portraits", *loss, seeds=1, cost=1.2)
    lossless = {f"{name}, identity loss": name for name in ("unpaired", f"unpaired, guidance {GUIDANCE:g}", masked)}
    in_unpaired, in_guided, in_paired = lossless
    rows += [
        plan.measure(lossless[in_unpaired], unpaired, "--guidance-scale", "1.0"),
        plan.measure(in_unpaired, kept, "--guidance-scale", "1.0"),
        plan.measure(lossless[in_guided], unpaired, *guided),
        plan.measure(in_guided, kept, *guided),
        plan.measure(in_paired, paired_kept, *guided),
    ]
    closes, costs = "closes half of what is missing in keeping the person", "costs no more than 2 points of flips"
    for with_loss, without in lossless.items():
        claims += [
            _claim(closes, "identity_rank_1", with_loss, without, kind="half_of_missing"),
            _claim(costs, "flip_rate", with_loss, without, kind="not_worse_by", threshold=0.02),
        ]
    label = ("--classifier-guidance", plan.guide(), "--classifier-scale", str(CLASSIFIER_SCALE))
    halved = str(max(plan.size.epochs // 2, 1))  # every row is there in both directions
    ways_both = ("--target-domain", "None", "--epochs", halved)
    both = plan.runs("unpaired-both", "portraits", "--pairing", "unpaired", *ways_both, seeds=1)
    own = plan.runs("self", "portraits", "--pairing", "self", seeds=1)
    ddib, sdedit = ("--start", "ddib", "--sampler", "ddim"), ("--start", "sdedit", "--strength", "0.5")
    rows += [
        plan.measure(
            "unpaired by DDIB", both, "--guidance-scale", "1.0", *ddib, "--num-steps", str(2 * plan.size.num_steps)
        ),
        plan.measure("unpaired by SDEdit", both, "--guidance-scale", "1.0", *sdedit),
        plan.measure("unpaired by SDEdit, classifier guidance", both, "--guidance-scale", "1.0", *sdedit, *label),
        plan.measure("self", own, "--guidance-scale", "1.0"),
        plan.measure("self, classifier guidance", own, "--guidance-scale", "1.0", *label),
    ]
    led = {"unpaired by SDEdit, classifier guidance": "unpaired by SDEdit", "self, classifier guidance": "self"}
    claims += [_claim("raises flips", "flip_rate", ours, plain) for ours, plain in led.items()]
    slow = plan.runs("slow", "portraits", "--optim.learning-rate", f"{plan.size.learning_rate / 10:g}", seeds=1)
    rows.append(plan.measure(f"{masked}, a tenth of the learning rate", slow, *guided))
    names = tuple(row.name for row in rows)
    figures = (
        Figure(kind="images", title="How the condition gets in", rows=names[:4], domain="male"),
        Figure(kind="images", title="Without pairs: what keeps the person", rows=names[4:9], domain="male"),
        Figure(kind="images", title="Without pairs, other ways", rows=names[9:14], domain="male"),
        Figure(kind="bars", title="Is it the same person?", y="identity_rank_1", domain="male"),
        Figure(kind="bars", title="Does it show the wanted sex?", y="flip_rate", domain="male"),
        Figure(
            kind="curves",
            title="Two learning rates: the validation curve, on the same images, timesteps and noise every time",
            runs=(paired[0], slow[0]),
        ),
    )
    return Section(
        key="problems",
        title="The open problems",
        question="What reaches the decoder, who is kept, and what can be done without pairs?",
        rows=tuple(rows),
        metrics=PORTRAITS,
        claims=tuple(claims),
        figures=figures,
        notes=("The identity loss uses an encoder of the training people; a second one, of other people, measures.",),
    )


def stress(plan: _Planning) -> Section:
    assert plan.snapshots is not None
    names = ("portraits", *(("faces",) if plan.celeba is not None else ()))
    translations, rows = [], []
    for name in names:
        paired = plan.runs("paired" if name == "portraits" else "matched", name, seeds=1)
        rows.append(plan.measure(f"{name}, held out", paired, "--guidance-scale", str(GUIDANCE)))
        for align in ("auto", "none"):
            argv = (
                *("--checkpoint", f"{{{paired[0]}}}", "--input", plan.snapshots, "--output", "{out}"),
                *("--domain", DIRECTIONS[name][1], "--num-steps", str(plan.size.num_steps), "--align", align),
                *("--guidance-scale", str(GUIDANCE), "--output-size", "model"),  # what the judges know
            )
            key = f"snapshots/{name}-{align}"
            translations.append(plan.add(Command(key=key, module="jobs.translate", argv=argv, how=ALONE, cost=30)))
    figures = tuple(
        Figure(
            kind="stress",
            title=f"Private snapshots through a network of {SHOWN[name]}",
            translations=tuple(key for key in translations if key.startswith(f"snapshots/{name}-")),
            classifier=plan.judge_domain(name),
            identity=plan.judge_identity(name) or "",
            data=f"{{{plan.data(name)}}}",
        )
        for name in names
    )
    return Section(
        key="stress",
        title="Private snapshots",
        question="What becomes of a photo that is like nothing in the training images?",
        rows=tuple(rows),
        metrics=("flip_rate", "identity_cosine", "identity_rank_1"),
        figures=figures,
        notes=("Faces are found and aligned as the training images are (--align auto), or not (none).",),
    )


def guidance(plan: _Planning) -> Section:
    paired = plan.runs("paired", "portraits")[:1]
    rows, groups = [], []
    for sampler in ("ddim", "ddpm", "dpm_solver"):
        for weight in plan.size.grid_weights:
            for count in plan.size.grid_steps:
                flags = ("--sampler", sampler, "--guidance-scale", str(weight), "--num-steps", str(count))
                name = f"{sampler}, guidance {weight:g}, {count} steps"
                rows.append(plan.measure(name, paired, *flags, num_images=plan.size.num_grid_images))
                groups.append(f"{sampler}, guidance {weight:g}")
    return Section(
        key="guidance",
        title="Guidance weight, steps and sampler",
        question="What does quality cost in network evaluations?",
        rows=tuple(rows),
        metrics=("psnr", "kid", "flip_rate", "identity_rank_1", "nfe", "images_per_s"),
        figures=tuple(
            Figure(kind="tradeoff", title=title, groups=tuple(groups), domain="male", x="nfe", y=metric)
            for metric, title in {"kid": "Realism", "psnr": "Faithfulness"}.items()
        ),
        notes=("One training; fewer images for each point than in the other sections.",),
    )


SECTIONS = {
    "injection": injection,
    "day2night": day2night,
    "gans": gans,
    "problems": problems,
    "stress": stress,
    "guidance": guidance,
}
PORTRAITS = (
    *("psnr", "ssim", "perceptual", "kid", "flip_rate", "identity_cosine", "identity_rank_1"),
    *("diversity", "copied", "nfe"),
)
SHOWN = {"portraits": "drawn portraits", "faces": "real faces"}
WON = {
    "psnr": "faithfulness (PSNR)",
    "ssim": "faithfulness (SSIM)",
    "kid": "KID",
    "identity_rank_1": "keeping the person",
}
IDENTITY_WEIGHT, CLASSIFIER_SCALE = 0.04, 1.0


def _claim(text: str, metric: str, ours: str, theirs: str | None = None, domain: str = "male", **more: Any) -> Claim:
    return Claim(text=f"{ours}: {text}", metric=metric, domain=domain, ours=ours, theirs=theirs, **more)


def _shown(figure: Figure, rows: Sequence[Measured], data: str) -> Figure:
    names = figure.rows or tuple(row.name for row in rows)
    real = DIRECTIONS["faces"][1] if names[0].startswith("real faces") else DIRECTIONS[data][1]
    return dataclasses.replace(figure, rows=names, domain=real)
