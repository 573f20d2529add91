"""A sweep's page: what it says is what was measured, luck is told from gain, and any part may be missing."""

import base64
import copy
import html
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from ddpm_core import images
from jobs.common.intervals import ENOUGH, Interval
from jobs.reports import charts as reports_charts
from jobs.reports import sweep, sweep_charts

HOSTILE = "<script>alert('x')</script> & \"CUDA\" http://evil.example"
LEARNING_RATE = {"low": 1e-5, "high": 1e-2, "log": True, "integer": False}
SWEEP: dict[str, Any] = {
    "format": "ddpm-translate-sweep",
    "uri": "/sweeps/earth",
    "data": {"name": "earth", "licence": "public domain", "content_hash": "abc123", "pairing": "paired"},
    "preset": "demo",
    "command": "python -m jobs.sweep --preset demo",
    "seed": 0,
    "space": {
        "optim.learning_rate": LEARNING_RATE,
        "unet.injection": {"choices": [["concat"], ["cross_attention"], ["concat", "cross_attention"]]},
        "p_uncond": {"low": 0.0, "high": 0.4, "log": False, "integer": False},
    },
    "sampling_space": {
        "guidance_scale": {"low": 1.0, "high": 4.0, "log": False, "integer": False},
        "num_steps": {"low": 4, "high": 50, "log": True, "integer": True},
        "sampler": {"choices": ["ddim", "dpm_solver"]},
    },
    "num_trials": 16,
    "num_points": 40,
    "epochs": 9,
    "early_stopping": {"grace_epochs": 3, "reduction_factor": 3},
    "search": "tpe",
    "rule": "Of the front, the point with the best realism among those within 0.5 dB of the best PSNR.",
    "options": {"optim": {"learning_rate": 2e-4, "weight_decay": 0.0}, "epochs": 9},
    "environment": {"date": "2026-01-02T03:04:05+00:00", "python": "3.11.2", "packages": {"torch": "2.8.0"}},
}


def trial(number: int, rate: float, **changes: Any) -> dict[str, Any]:
    """A training whose loss is best at a learning rate of 6e-4, worse by half for each decade away from it."""
    rng = np.random.default_rng(number)
    last = 0.03 * (1 + 0.5 * abs(math.log10(rate / 6e-4))) + 0.002 * rng.random()
    epochs = changes.pop("epochs", 9)
    bounce = rng.normal(scale=0.03 + 20 * rate, size=epochs)
    curve = [[e, float(last * (1 + 3 / e**1.3) * math.exp(max(bounce[e - 1], -0.2)))] for e in range(1, epochs + 1)]
    injection = (["concat"], ["cross_attention"], ["concat", "cross_attention"])[number % 3]
    return {
        "number": number,
        "state": "complete",
        "values": {"optim.learning_rate": rate, "unet.injection": injection, "p_uncond": float(0.4 * rng.random())},
        "loss": min((loss for _, loss in curve), default=None),
        "curve": curve,
        "epochs": epochs,
        "steps": epochs * 120,
        "seconds": 40.0 * epochs,
        "error": None,
        "hand": False,
        "run": f"trials/{number:04d}",
        **changes,
    }


def point(number: int, **changes: Any) -> dict[str, Any]:
    """A sampling: more guidance is more real and less faithful, more steps are better and dearer."""
    rng = np.random.default_rng(100 + number)
    scale, steps = float(1 + 3 * rng.random()), int(4 * 12.5 ** rng.random())
    objectives = {
        "kid": float(0.08 - 0.03 * math.tanh(scale - 1) + 0.1 / steps + 0.004 * rng.random()),
        "psnr": float(24 - 1.3 * scale - 8 / steps + 0.5 * rng.random()),
        "identity_cosine": float(0.8 - 0.05 * scale + 0.02 * rng.random()),
        "nfe": 2.0 * steps,
    }
    return {
        "number": number,
        "state": "complete",
        "values": {"guidance_scale": scale, "num_steps": steps, "sampler": ("ddim", "dpm_solver")[number % 2]},
        "objectives": objectives,
        "seconds": 12.0,
        "error": None,
        "hand": False,
        "front": False,
        "chosen": False,
        **changes,
    }


def interval(mean: float, width: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - width, "high": mean + width}


def compared(seen: tuple[float, float], fresh: tuple[float, float], width: float) -> dict[str, Any]:
    return {
        "seen": dict(zip(("chosen", "hand"), seen, strict=True)),
        "chosen": interval(fresh[0], width),
        "hand": interval(fresh[1], width),
        "difference": interval(fresh[0] - fresh[1], width),
    }


TRAINED_AGAIN = {
    "split": "test",
    "num_images": 128,
    "seen": {"winner": 0.0310, "hand": 0.0400},
    "fresh": {
        "winner": interval(0.0312, 0.002),
        "hand": interval(0.0401, 0.002),
        "difference": {"mean": -0.0089, "low": -0.0101, "high": -0.0077},
    },
}
SAMPLED_AGAIN = {
    "split": "test",
    "num_images": 256,
    "values": {
        "chosen": {"guidance_scale": 2.5, "num_steps": 12, "sampler": "dpm_solver"},
        "hand": {"guidance_scale": 1.5, "num_steps": 20, "sampler": "ddim"},
    },
    "objectives": {
        "kid": compared((0.050, 0.070), (0.056, 0.071), 0.004),
        "psnr": compared((20.1, 21.0), (20.0, 20.9), 0.3),
        "identity_cosine": compared((0.70, 0.69), (0.69, 0.70), 0.02),
        "nfe": {"seen": {"chosen": 24, "hand": 20}, "chosen": 24, "hand": 20},
    },
}


def dominated(one: dict[str, Any], other: dict[str, Any]) -> bool:
    signs = {"kid": 1, "psnr": -1, "identity_cosine": -1, "nfe": 1}
    return all(signs[key] * other[key] < signs[key] * one[key] for key in signs)


@pytest.fixture
def results() -> dict[str, Any]:
    rates = (2e-4, 1.1e-5, 6e-5, 5e-4, 2e-3, 8e-4, 9e-3, 3e-4, 6.5e-4, 1.5e-4, 4e-4, 7e-4, 3e-5, 1e-3, 9e-4, 5.5e-4)
    trials = [trial(number, rate) for number, rate in enumerate(rates)]
    trials[0]["hand"] = True
    for number in (1, 2, 12):
        trials[number] = trial(number, rates[number], state="stopped", epochs=3)
    trials[6] = trial(6, 9e-3, state="diverged", epochs=2, loss=None, error="the loss is not a number")
    trials[9] = trial(9, 1.5e-4, state="failed", epochs=0, loss=None, error=HOSTILE)
    complete = [each for each in trials if each["state"] == "complete"]
    points = [point(number) for number in range(40)]
    points[0]["hand"] = True
    for number in (7, 8, 21):
        points[number] |= {"state": "failed", "objectives": None, "error": HOSTILE}
    there = [each for each in points if each["objectives"]]
    for each in there:
        each["front"] = not any(dominated(each["objectives"], other["objectives"]) for other in there)
    next(each for each in there if each["front"] and not each["hand"])["chosen"] = True
    return {
        "state": "finished",
        "message": "",
        "at": "2026-01-02T05:04:05+00:00",
        "left_s": None,
        "trials": trials,
        "best_trial": min(complete, key=lambda each: each["loss"])["number"],
        "points": points,
        "importance": {
            "training": {"optim.learning_rate": 0.86, "unet.injection": 0.1, "p_uncond": 0.04},
            "sampling": {
                "kid": {"guidance_scale": 0.61, "num_steps": 0.3, "sampler": 0.09},
                "psnr": {"guidance_scale": 0.8, "num_steps": 0.15, "sampler": 0.05},
                "nfe": {"num_steps": 1.0, "guidance_scale": 0.0, "sampler": 0.0},
            },
        },
        "again": {"training": copy.deepcopy(TRAINED_AGAIN), "sampling": copy.deepcopy(SAMPLED_AGAIN)},
    }


def undrawn_chart(draw: Any, caption: str, **_: Any) -> dict[str, str]:
    return {"light": "data:image/svg+xml;base64,", "dark": "data:image/svg+xml;base64,", "caption": caption}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what a page says, charts need not be drawn."""
    monkeypatch.setattr(reports_charts, "chart", undrawn_chart)


def page_of(results: dict[str, Any], **changes: Any) -> str:
    page = sweep.build({**SWEEP, **changes}, results)
    Strict().read(page)
    return page


class Strict(HTMLParser):
    """Every tag is closed where it should be, and nothing is fetched or executed."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def read(self, page: str) -> None:
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "srcset", "href"):
                assert value
                assert value.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) or re.fullmatch(
                    r"[\w./-]+", value
                )

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def sections_of(page: str) -> list[str]:
    return re.findall("<section[^>]*><h2[^>]*>(.*?)</h2>", page)


def charts_of(page: str) -> list[str]:
    """Their SVG."""
    return [base64.b64decode(text).decode() for text in re.findall(r'svg\+xml;base64,([^"]+)"', page)]


def row_of(page: str, head: str) -> list[str]:
    """The texts of the cells of the first row with this head."""
    row = next(row for row in re.findall("<tr.*?</tr>", page) if re.sub("<.*?>", "", row.split("</th>")[0]) == head)
    return [" ".join(re.sub("<.*?>", " ", cell).split()) for cell in re.findall("<td.*?</td>", row)]


SECTIONS = [
    "Finished",
    "What came of it",
    "Optimisation history",
    "Option by option",
    "What matters",
    "Training by learning rate",
    "Trade-offs of sampling",
    "Images",
    "Trials",
    "Points of sampling",
    "Where it comes from",
]


def test_the_page_has_every_part_and_stands_by_itself(tmp_path: Path, results: dict[str, Any]) -> None:
    grid = images.encode_png(np.full((16, 16, 3), 7, np.uint8))
    uri = sweep.write(str(tmp_path), SWEEP, results, [("guidance 0 <to> 4", grid)])
    assert uri == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    Strict().read(page)
    assert sections_of(page) == SECTIONS
    for text in (
        "<title>earth: sweep from demo</title>",
        "16 trials of 9 epochs · 40 points of sampling · Sobol, then TPE · ",
        "ASHA: from epoch 3 on 1 in 3 goes on · 2026-01-02",
        "11 complete, 3 stopped early, 1 diverged, 1 failed",
        html.escape(SWEEP["rule"]),
        "PED-ANOVA (Watanabe et al. 2023)",
        "guidance 0 &lt;to&gt; 4",
        "optim.weight_decay",
        "1e-5 to 0.01, log scale",
        "4 to 50, whole numbers, log scale",
        "one of concat, cross_attention, concat, cross_attention",
        "packages.torch",
        "public domain",
        "python -m jobs.sweep --preset demo",
    ):
        assert text in page
    charts = charts_of(page)
    assert len(charts) == 2 * (1 + 3 + 1 + 4)  # for light and dark
    assert all(len(re.findall("<path|<use", chart)) > 20 for chart in charts)  # axes, letters, marks
    assert page.count("data:image/png") == 1


@pytest.mark.usefixtures("undrawn")
def test_the_winner_stands_beside_the_hand_choice(results: dict[str, Any]) -> None:
    page, best = page_of(results), results["best_trial"]
    winner, hand = (results["trials"][number] for number in (best, 0))
    assert f"<th>winner, trial {best}</th><th>hand choice</th>" in page
    for name in ("optim.learning_rate", "p_uncond"):
        assert row_of(page, name) == [f"{each['values'][name]:.4g}" for each in (winner, hand)]
    assert row_of(page, "validation loss in the search") == [f"{each['loss']:.4g}" for each in (winner, hand)]
    assert row_of(page, "loss on fresh noise") == ["0.0312 0.0292 … 0.0332", "0.0401 0.0381 … 0.0421"]
    assert row_of(page, "guidance_scale") == ["2.5", "1.5"]
    assert row_of(page, "KID ↓") == [
        "0.0500",
        "0.0700",
        "0.0560 0.0520 … 0.0600",
        "0.0710 0.0670 … 0.0750",
        "−0.0150 −0.0190 … −0.0110",
        "better, more than chance",
        "about 25 % of the lead was luck (5 % to 45 %)",
    ]
    assert row_of(page, "PSNR to the truth, dB ↑")[-2:] == ["worse, more than chance", "there was no lead"]
    assert row_of(page, "identity cosine ↑")[-2:] == ["no more than chance", "the lead cannot be told from luck"]
    assert row_of(page, "network evaluations an image ↓") == ["24", "20", "24", "20", "+4", "worse", "–"]
    assert "Of 4 objectives the chosen sampling is better in 1, worse in 2, and in 1 as good" in page


@pytest.mark.parametrize(
    ("lead", "gain", "words"),
    [
        (0.2, (0.15, 0.1, 0.2), "about 25 % of the lead was luck (0 % to 50 %)"),
        (0.2, (0.19, 0.01, 0.37), "about 5 % of the lead was luck (0 % to 95 %)"),
        (0.2, (0.05, -0.01, 0.11), "the lead cannot be told from luck"),
        (0.2, (0.25, 0.2, 0.3), "the lead did not shrink, no sign of luck"),
        (0.2, (-0.05, -0.08, -0.02), "all of the lead was luck"),
        (0.0, (0.05, 0.01, 0.09), "there was no lead"),
        (-0.1, (0.05, 0.01, 0.09), "there was no lead"),
    ],
)
def test_luck_is_what_a_lead_loses(lead: float, gain: tuple[float, float, float], words: str) -> None:
    assert sweep.luck(lead, Interval(*gain), 128) == words


@pytest.mark.parametrize(
    ("gap", "lower", "outcome"),
    [
        ((-0.2, -0.3, -0.1), True, "better"),
        ((-0.2, -0.3, -0.1), False, "worse"),
        ((0.2, 0.1, 0.3), True, "worse"),
        ((0.2, 0.1, 0.3), False, "better"),
        ((0.1, -0.1, 0.3), True, "even"),
        ((-0.1, -0.3, 0.1), False, "even"),
        ((0.0, 0.0, 0.0), True, "even"),
    ],
)
def test_a_difference_counts_where_its_interval_leaves_out_zero(gap: Any, lower: bool, outcome: str) -> None:
    assert sweep.judged(Interval(*gap), lower=lower, num=ENOUGH) == outcome
    assert sweep.judged(Interval(*gap), lower=lower, num=ENOUGH - 1) == "even"


def fresh(winner: float, hand: float, width: float) -> dict[str, Any]:
    means = {"winner": interval(winner, 0.001), "hand": interval(hand, 0.001)}
    return {**TRAINED_AGAIN, "fresh": {**means, "difference": interval(winner - hand, width)}}


def test_gain_in_loss_is_told_in_plain_words() -> None:
    assert sweep.gain_in_loss(TRAINED_AGAIN) == (
        "better",
        "On fresh noise the winner's loss is 0.0312, the hand choice's 0.0401: 22 % lower, more than chance "
        "(difference −0.0089, −0.0101 to −0.0077).",
        "Seen in the search it was 0.0310 against 0.0400, 22 % lower: about 1.4 % of the lead was luck (0 % to 15 %). "
        "Measured again on 128 images of test.",
    )
    outcome, text, figures = sweep.gain_in_loss(fresh(0.0390, 0.0400, 0.002)) or ("", "", "")
    assert (outcome, text) == (
        "even",
        "On fresh noise the winner's loss is 0.0390, the hand choice's 0.0400: 2.5 % lower, no more than chance "
        "(difference −0.001, −0.003 to +0.001).",
    )
    assert "22 % lower: the lead cannot be told from luck." in figures
    outcome, text, figures = sweep.gain_in_loss(fresh(0.0420, 0.0400, 0.001)) or ("", "", "")
    assert outcome == "worse"
    assert "5 % higher, more than chance" in text
    assert text.endswith("The hand choice is the better one.")
    assert "all of the lead was luck" in figures


def test_a_loss_without_its_counterpart_is_not_compared() -> None:
    assert sweep.gain_in_loss({}) is None
    alone = {"fresh": {"winner": interval(0.03, 0.001), "hand": None, "difference": None}}
    assert sweep.gain_in_loss(alone) is None
    unseen = sweep.gain_in_loss({"fresh": TRAINED_AGAIN["fresh"], "seen": {"winner": 0.031, "hand": None}})
    assert unseen is not None
    assert unseen[2] == ""


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_no_more_than_chance(results: dict[str, Any]) -> None:
    results["again"] = {"training": fresh(0.0390, 0.0400, 0.002), "sampling": None}
    page = page_of(results)
    assert "2.5 % lower, no more than chance" in page
    assert '<li class="even"><span class="mark" aria-hidden="true">≈</span>' in page
    assert '<li class="good">' not in page
    assert "Not measured again: how much of this is luck is not known." in page  # the sampling


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("state", ["stopped", "diverged", "complete"])
def test_gain_is_claimed_only_over_a_baseline_that_was_trained_as_long(results: dict[str, Any], state: str) -> None:
    assert '<li class="good">' in page_of(results)
    results["trials"][0] |= {"state": state, "epochs": 5}
    page = page_of(results)
    word = sweep_charts.TRIALS[state][0]
    assert f"The hand choice ({word}) was trained for 5 of 9 epochs: no gain is claimed over it." in page
    assert "22 % lower" not in page
    assert '<li class="good">' not in page
    assert row_of(page, "epochs trained") == ["9", "5"]


@pytest.mark.usefixtures("undrawn")
def test_few_images_tell_no_gain_from_luck(results: dict[str, Any]) -> None:
    for again in results["again"].values():
        again["num_images"] = 12
    page = page_of(results)
    assert "Measured again, the losses are 0.0312 and 0.0401. This rests on 12 images: too few" in page
    assert row_of(page, "KID ↓")[-2:] == ["too few images to tell", "–"]
    assert row_of(page, "network evaluations an image ↓")[-2:] == ["worse", "–"]  # counted
    for claim in ("more than chance,", "better, more", "of the lead was luck", "no sign of luck", '<li class="good">'):
        assert claim not in page


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_that_could_not_judge_realism_says_so(results: dict[str, Any]) -> None:
    told = "Realism was no objective: KID needs 20 validation images of each side."
    assert told not in page_of(results)
    del results["again"]["sampling"]["objectives"]["kid"]
    for each in results["points"]:
        each["objectives"] = each["objectives"] and {k: v for k, v in each["objectives"].items() if k != "kid"}
    assert told in page_of(results)


@pytest.mark.usefixtures("undrawn")
def test_a_winner_without_a_rival_has_won_nothing(results: dict[str, Any]) -> None:
    results |= {"trials": results["trials"][:1], "best_trial": 0}
    assert "It is the only trial that came to its end: there is nothing to compare it with." in page_of(results)
    results |= {"trials": [{**each, "hand": False} for each in (trial(0, 2e-4), trial(1, 3e-4))]}
    assert "The hand choice lies outside the space and was not tried" in page_of(results)


@pytest.mark.usefixtures("undrawn")
def test_what_matters_is_shown_from_enough_trials_on(results: dict[str, Any]) -> None:
    page = page_of(results)
    assert "How much each option of training matters is not shown: that takes 20 trials, there are 14." in page
    assert "Training: importance" not in page
    assert "Sampling: importance" in page  # of 37 points
    more = [trial(number, 3e-4) for number in range(16, 22)]
    page = page_of({**results, "trials": [*results["trials"], *more], "points": results["points"][:4]})
    assert "Training: importance" in page
    assert "Sampling: importance" not in page
    assert "of sampling matters is not shown: that takes 20 points, there are 4." in page


@pytest.mark.usefixtures("undrawn")
def test_a_hand_choice_that_wins_is_told_as_such(results: dict[str, Any]) -> None:
    results |= {"best_trial": 0, "again": {}}
    page = page_of(results)
    assert "The search found nothing better: the hand choice itself is the best of 14 trials." in page
    assert "<th>winner, trial 0</th></tr>" in page
    chosen = next(each for each in results["points"] if each["chosen"])
    chosen["chosen"] = False
    results["points"][0]["chosen"] = True
    assert "The hand choice itself is the chosen point." in page_of(results)


def test_the_best_so_far_is_of_complete_trials_in_their_order() -> None:
    def made(number: int, loss: float | None, state: str = "complete") -> dict[str, Any]:
        return {"number": number, "loss": loss, "state": state}

    trials = [made(3, 0.4), made(0, 0.5), made(1, 0.6), made(2, 0.1, "stopped"), made(4, None), made(5, 0.3)]
    assert sweep_charts.best_so_far(trials) == [(0, 0.5), (1, 0.5), (3, 0.4), (5, 0.3)]
    assert sweep_charts.best_so_far([made(0, 0.1, "diverged")]) == []


@pytest.mark.parametrize(
    ("objectives", "pairs"),
    [
        (["kid", "psnr", "nfe"], [("psnr", "kid"), ("nfe", "kid"), ("nfe", "psnr")]),
        (
            ["kid", "psnr_to_source", "identity_cosine", "flip_rate", "nfe"],
            [("psnr_to_source", "kid"), ("nfe", "kid"), ("nfe", "psnr_to_source"), ("nfe", "identity_cosine")],
        ),
        (["kid", "identity_cosine"], [("identity_cosine", "kid")]),
        (["identity_cosine", "flip_rate"], [("identity_cosine", "flip_rate")]),
        (["kid"], []),
        ([], []),
    ],
)
def test_which_objectives_are_drawn_against_each_other(objectives: list[str], pairs: list[tuple[str, str]]) -> None:
    assert sweep.pairs_of(objectives) == pairs


def test_curves_are_coloured_by_the_learning_rate_or_the_first_range() -> None:
    other, choices = {"low": 0, "high": 1}, {"choices": [1, 2]}
    rate = sweep.LEARNING_RATE
    assert sweep.colored_by({"a": other, rate: LEARNING_RATE}) == rate
    assert sweep.colored_by({"c": choices, "a": other, "b": other}) == "a"
    assert sweep.colored_by({"c": choices}) is None


def axes() -> Any:
    return Figure().add_subplot()


def lines_of(drawn: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in drawn.get_lines()}


def test_the_history_shows_each_trial_where_it_belongs(results: dict[str, Any]) -> None:
    drawn, trials, best = axes(), results["trials"], results["best_trial"]
    sweep_charts.draw_history(drawn, trials, best)
    lines = lines_of(drawn)
    assert lines["complete"] == [(t["number"], t["loss"]) for t in trials if t["state"] == "complete"]
    assert lines["stopped early"] == [(t["number"], t["loss"]) for t in trials if t["state"] == "stopped"]
    assert (lines["diverged"], lines["failed"]) == ([(6, 1.0)], [(9, 1.0)])  # the top edge, not a loss of 1
    assert lines["hand choice"] == [(0, trials[0]["loss"])]
    assert lines["winner"] == [(best, trials[best]["loss"])]
    assert lines["best so far"][-1] == (15, trials[best]["loss"])
    assert (drawn.get_xlabel(), drawn.get_ylabel(), drawn.get_yscale()) == ("trial", "validation loss", "linear")
    trials[4]["loss"] = 9.0
    drawn = axes()
    sweep_charts.draw_history(drawn, trials, best)
    assert drawn.get_yscale() == "log"


def test_a_slice_has_the_scale_of_its_option(results: dict[str, Any]) -> None:
    drawn = {}
    for name, allowed in SWEEP["space"].items():
        drawn[name] = axes()
        sweep_charts.draw_slice(drawn[name], results["trials"], name, allowed, results["best_trial"])
    assert {name: each.get_xscale() for name, each in drawn.items()} == {
        "optim.learning_rate": "log",
        "unet.injection": "linear",
        "p_uncond": "linear",
    }
    labels = [text.get_text() for text in drawn["unet.injection"].get_xticklabels()]
    assert labels == ["concat", "cross_attention", "concat,\ncross_attention"]
    by_category = lines_of(drawn["unet.injection"])["complete"]
    numbers = [each["number"] for each in results["trials"] if each["state"] == "complete"]
    assert [round(place) for place, _ in by_category] == [number % 3 for number in numbers]


def test_values_that_no_trial_has_or_that_the_space_lacks_do_not_hurt(results: dict[str, Any]) -> None:
    results["trials"][3]["values"] = {"unet.injection": ["film"], "optim.learning_rate": None}
    results["trials"][0]["values"] = {"p_uncond": 0.2, "optim.learning_rate": 0.0}
    space = {**SWEEP["space"], "never": {"low": 0, "high": 1}, "one": {"choices": [True]}}
    page = page_of(results, space=space)
    assert 'alt="never"' not in page
    drawn = axes()
    sweep_charts.draw_slice(drawn, results["trials"], "unet.injection", SWEEP["space"]["unet.injection"], None)
    assert [text.get_text() for text in drawn.get_xticklabels()][-1] == "film"


def test_the_curves_end_where_the_trials_ended(results: dict[str, Any]) -> None:
    drawn, rate = axes(), sweep.LEARNING_RATE
    trials = [each for each in results["trials"] if each["curve"]]
    sweep_charts.draw_curves(drawn, trials, rate, True, results["best_trial"])
    assert [line.get_xdata()[-1] for line in drawn.get_lines()] == [each["epochs"] for each in trials]
    widths = {each["number"]: line.get_linewidth() for each, line in zip(trials, drawn.get_lines(), strict=True)}
    assert max(widths, key=widths.__getitem__) == results["best_trial"]
    bar = drawn.figure.axes[1]
    assert bar.get_yscale() == "log"
    assert bar.get_ylim() == (pytest.approx(1.1e-5), pytest.approx(9e-3))


def test_a_pareto_plot_tells_the_front_the_chosen_and_the_hand_choice(results: dict[str, Any]) -> None:
    drawn, points = axes(), results["points"]
    sweep_charts.draw_pareto(drawn, points, "nfe", "kid")
    lines = lines_of(drawn)

    def places(key: str, value: bool = True) -> list[tuple[float, float]]:
        there = [each for each in points if each["objectives"] and each[key] == value]
        return [(each["objectives"]["nfe"], each["objectives"]["kid"]) for each in there]

    assert lines["front"] == places("front")
    assert lines["other points"] == places("front", False)
    assert (lines["chosen"], lines["hand choice"]) == (places("chosen"), places("hand"))
    assert drawn.get_xscale() == "log"
    assert "lower is better" in drawn.get_ylabel()
    assert [text.get_text() for text in drawn.texts] == ["chosen"]


@pytest.mark.usefixtures("undrawn")
def test_errors_are_escaped_summed_up_and_cut(results: dict[str, Any]) -> None:
    results["points"][21]["error"] = "x" * 5000
    page = page_of(results)
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    assert "3 of 40 points failed:" in page
    assert "<li>2 × &lt;script&gt;" in page
    assert "x" * 301 not in page


@pytest.mark.usefixtures("undrawn")
def test_what_a_user_wrote_is_escaped_everywhere(results: dict[str, Any]) -> None:
    data = {"name": HOSTILE, "licence": HOSTILE, "pairing": HOSTILE}
    results["message"] = HOSTILE
    results["trials"][1]["values"][HOSTILE] = results["points"][0]["values"][HOSTILE] = HOSTILE
    results["importance"]["training"][HOSTILE] = results["importance"]["sampling"]["kid"][HOSTILE] = 0.1
    space = {**SWEEP["space"], HOSTILE: {"choices": [HOSTILE]}}
    changes = {"space": space, "sampling_space": space, "data": data, "preset": HOSTILE, "options": {HOSTILE: HOSTILE}}
    page = page_of(results, **changes, rule=HOSTILE, command=HOSTILE, uri=HOSTILE)
    assert "<script" not in page


@pytest.mark.usefixtures("undrawn")
def test_trials_are_listed_with_their_reports(results: dict[str, Any]) -> None:
    page, best = page_of(results), results["best_trial"]
    assert re.findall('href="(.*?)"', page) == [f"trials/{number:04d}/report.html" for number in range(16)]
    assert f'<tr class="ours"><th><a href="trials/{best:04d}/report.html">{best}</a> <small>winner</small>' in page
    assert '<a href="trials/0000/report.html">0</a> <small>hand choice</small>' in page
    assert "<details><summary>Table of 16 trials</summary>" in page
    results["trials"] = results["trials"][:5]
    assert "Table of 5 trials" not in page_of(results)  # short enough to lie open


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("state", "live"),
    [("training", 1), ("sampling", 1), ("checking", 1), ("finished", 0), ("interrupted", 0), ("failed", 0)],
)
def test_the_page_loads_itself_again_only_while_the_sweep_goes_on(state: str, live: int) -> None:
    trials = [trial(0, 2e-4, hand=True), trial(1, 5e-4), trial(2, 1e-3, state="running", loss=None, curve=[])]
    results = {
        "state": state,
        "message": "stop & go",
        "left_s": 200.0,
        "trials": trials,
        "at": SWEEP["environment"]["date"],
    }
    page = page_of(results)
    assert page.count('http-equiv="refresh"') == live
    assert ("<title>4% · earth: sweep from demo</title>" in page) == bool(live)  # 2 of 16 trials and 40 points
    assert f">{sweep.STATES[state][1]}</h2>" in page
    assert ("3 min 20 s" in page) == bool(live)
    assert ('<progress value="2" max="56"' in page) == (state != "finished")
    assert "stop &amp; go" in page
    assert "As of 2026-01-02 03:04:05 UTC." in page
    assert "2 of 16" in page


def test_nothing_but_the_beginning_is_a_page() -> None:
    page = sweep.build({}, {})
    Strict().read(page)
    assert sections_of(page) == []
    page = page_of({"state": "training", "trials": None, "points": [], "importance": None, "again": None})
    assert sections_of(page) == ["Training", "Where it comes from"]
    assert charts_of(page) == []


def test_a_checkpoint_that_is_only_sampled_has_no_trials(results: dict[str, Any]) -> None:
    changes = {"preset": None, "checkpoint": "/runs/earth", "space": {}, "num_trials": 0, "early_stopping": None}
    found = {**results, "trials": [], "best_trial": None, "importance": {}, "again": {"training": None}}
    page = page_of(found, **changes)
    assert "<title>earth: sweep from a checkpoint</title>" in page
    assert "<dd>/runs/earth</dd>" in page
    assert "early stopping" not in page
    assert sections_of(page)[:3] == ["Finished", "What came of it", "Trade-offs of sampling"]
    assert "<h3>Training</h3>" not in page


def test_one_trial_is_enough() -> None:
    page = page_of({"state": "training", "trials": [trial(0, 2e-4, hand=True)], "best_trial": 0})
    assert "It is the only trial that came to its end yet" in page
    assert len(charts_of(page)) == 2 * (1 + 3 + 1)


def test_trials_that_were_all_lost_are_listed_and_not_drawn() -> None:
    trials = [trial(n, 1e-2, state=state, loss=None, curve=[]) for n, state in enumerate(("failed", "diverged"))]
    page = page_of({"state": "failed", "trials": trials, "best_trial": None, "message": "no trial came through"})
    assert sections_of(page) == ["Failed", "Trials", "Where it comes from"]
    assert charts_of(page) == []


def test_gaps_in_curves_and_equal_losses_are_drawn() -> None:
    trials = [trial(n, 2e-4, loss=0.03, curve=[[1, None], [2, 0.03], [3, None]]) for n in range(3)]
    trials.append(trial(3, 2e-4, state="running", loss=None, curve=[[1, None]]))
    page = page_of({"state": "training", "trials": trials, "best_trial": 1})
    assert len(charts_of(page)) == 2 * (1 + 3 + 1)


def test_without_a_range_there_is_no_panel_of_curves() -> None:
    space = {"unet.injection": {"choices": [["concat"]]}}
    page = page_of({"trials": [trial(0, 2e-4), trial(3, 2e-4)], "best_trial": 0}, space=space)
    assert "Option by option" in page
    assert "Training by" not in page


def test_equal_objectives_and_a_single_one_are_drawn_or_left_out() -> None:
    same = {"kid": 0.0, "psnr": 20.0, "nfe": 10.0}
    points = [point(n, objectives=dict(same), front=True) for n in range(3)]
    assert len(charts_of(page_of({"points": points}))) == 2 * 3
    points = [point(n, objectives={"kid": -0.001, "psnr": None}) for n in range(3)]
    assert charts_of(page_of({"points": points})) == []


def test_points_that_all_failed_leave_their_reasons() -> None:
    points = [point(n, state="failed", objectives=None, error=None) for n in range(3)]
    page = page_of({"state": "finished", "points": points})
    assert "Trade-offs of sampling" not in page
    assert "<li>3 × no reason told</li>" in page


def test_objectives_that_are_not_known_by_name_have_theirs() -> None:
    points = [point(n, objectives={"colour_match": 0.1 * n, "nfe": 8.0 + n}, front=True) for n in range(3)]
    page = page_of({"points": points})
    assert 'alt="colour match against network evaluations an image"' in page
