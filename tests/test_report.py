"""The report: one file, nothing fetched, what it says is what was measured."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import resvg_py
from PIL import Image

from ddpm_core import config as configs
from ddpm_core import images, storage
from ddpm_core.config import DataCard, ModelConfig
from jobs.reports import charts as reports_charts
from jobs.reports import metric_table, model_card, report
from jobs.reports.grids import FILM_ROWS, HEADER, film_strip, labelled_grid, ungrid


def picture(value: int, side: int = 16) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    config = {
        "format": "ddpm-translate",
        "image_size": 16,
        "domains": ["day", "night"],
        "target_domains": ["night"],
        "data": {"name": "earth", "licence": "public domain", "pairing": "paired"},
        "training": {"epochs": 3, "optim": {"learning_rate": 0.0002}, "note": "<script>alert(1)</script>"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.2", "date": "2026-01-02T03:04:05"}))
    rows = []
    for epoch in (1, 2, 3):
        at = {"step": epoch * 10, "epoch": epoch, "images_seen": epoch * 640}
        rows.append({**at, "split": "train", "loss": 1 / epoch, "learning_rate": 2e-4, "images_per_s": 70.0})
        bands = {f"loss_band_{band}": (band + 1) / epoch for band in range(4)}
        rows.append({**at, "split": "val", "loss": 1.1 / epoch, "loss_ci": 0.1, **bands})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 1, "high": mean + 1}


@pytest.fixture
def evaluation() -> dict[str, Any]:
    return {
        "checkpoint": "/runs/earth/checkpoints/step-30",
        "data": {"licence": "public domain", "source": "NASA Blue Marble"},
        "sampling": {"sampler": "ddim", "num_steps": 20, "guidance_scale": 1.5},
        "feature_net": "efficientnet-lite0",
        "domains": {
            "night": {
                "headline": "It beats a copy of the source in PSNR.",
                "num_images": 123,
                "methods": {
                    "model": {"name": "this model", "metrics": {"psnr": interval(21.5), "kid": interval(0.2)}},
                    "copy": {"name": "copy of the source", "metrics": {"psnr": interval(11.25), "kid": interval(0.3)}},
                    "real": {"name": "real images", "metrics": {"kid": interval(0.01)}},
                },
                "verdicts": [
                    {"better": True, "text": "PSNR: better than a copy by 10.25 dB", "figures": "95 %: 9 to 11"},
                    {"better": None, "text": "KID: no clear difference", "figures": ""},
                    {"better": False, "text": "SSIM: worse than a copy", "figures": ""},
                ],
                "notes": ["Counterparts are proxies."],
            }
        },
    }


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what a page says, charts need not be drawn."""

    def chart(draw: Any, caption: str, **_: Any) -> dict[str, str]:
        return {"light": "data:image/svg+xml;base64,", "dark": "data:image/svg+xml;base64,", "caption": caption}

    monkeypatch.setattr(reports_charts, "chart", chart)


def embedded_pngs(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'(?:src|srcset)="data:image/png;base64,([^"]+)"', page)]


def embedded_charts(page: str) -> list[Image.Image]:
    """As a browser draws them."""
    drawn = re.findall(r'(?:src|srcset)="data:image/svg\+xml;base64,([^"]+)"', page)
    svgs = [base64.b64decode(data).decode() for data in drawn]
    return [Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, dpi=96))) for svg in svgs]


def test_a_runs_report_has_curves_configuration_and_licence(run: Path) -> None:
    uri = report.write_report(str(run), run_uri=str(run))
    assert uri == str(run / "report.html")
    page = (run / "report.html").read_text()
    assert "earth: day → night" in page
    assert "1,920 images seen" in page
    assert "public domain" in page
    assert "training.optim.learning_rate" in page
    assert "3.11.2" in page
    charts = embedded_charts(page)
    assert len(charts) == 8  # loss, bands, learning rate and speed, each for dark and light pages
    for dark, light in zip(charts[::2], charts[1::2], strict=True):
        there = [np.asarray(chart.convert("RGBA"), np.int32) for chart in (dark, light)]
        assert min(light.size) > 200
        assert 0.01 < (there[0][..., 3] > 0).mean() < 0.5  # lines and letters on a transparent ground,
        assert np.array_equal(there[0][..., 3], there[1][..., 3])  # the same for both,
        seen = there[0][..., 3] > 200
        assert there[0][seen][:, :3].mean() > there[1][seen][:, :3].mean() + 20  # lighter on a dark page


@pytest.mark.usefixtures("undrawn")
def test_what_else_was_measured_has_a_curve_of_its_own(tmp_path: Path) -> None:
    rows = [
        {
            "split": "val",
            "step": n,
            "images_seen": n,
            "loss": 1.0,
            "loss_ci": 0.1,
            "ema_sigma_rel": 0.1,
            "accuracy": 0.5,
        }
        for n in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write_report(str(tmp_path), run_uri=str(tmp_path))
    captions = re.findall("<figcaption>(.*?)</figcaption>", (tmp_path / "report.html").read_text())
    assert captions == [
        "Loss: training, and validation with its 95 % band",
        "What else was measured of the validation images",
    ]


@pytest.mark.usefixtures("undrawn")
def test_an_evaluations_report_shows_verdicts_figures_and_images(run: Path, evaluation: dict[str, Any]) -> None:
    png = images.encode_png(picture(7))
    report.write_report(str(run), run_uri=str(run), evaluation=evaluation, images=[("held out & shown", png)])
    page = (run / "report.html").read_text()
    for text in (
        "It beats a copy of the source in PSNR.",
        "better than a copy by 10.25 dB",
        "Counterparts are proxies.",
    ):
        assert text in page
    assert [page.count(f'<li class="{kind}">') for kind in ("good", "even", "bad")] == [1, 1, 1]
    assert "21.50 <small>20.50 … 22.50</small>" in page
    assert "11.25" in page
    assert "ddim, 20 steps, guidance 1.5" in page
    assert "123 held-out images" in page
    assert "efficientnet-lite0" in page
    assert "NASA Blue Marble" in page
    assert "held out &amp; shown" in page
    shown = [Image.open(io.BytesIO(png)) for png in embedded_pngs(page)]
    assert any(image.size == (16, 16) and image.getpixel((0, 0)) == (7, 7, 7) for image in shown)


def test_the_best_method_is_marked_and_real_images_do_not_compete(evaluation: dict[str, Any]) -> None:
    page = report.build({}, evaluation, ())
    marked = re.findall(r'<td class="best">([\d.]+)', page)
    assert marked == ["21.50", "0.2000"]


def test_one_alone_is_not_the_best_nor_any_of_a_few_images(evaluation: dict[str, Any]) -> None:
    night = evaluation["domains"]["night"]
    del night["methods"]["copy"]
    assert 'class="best"' not in report.build({}, evaluation, ())
    night["methods"]["copy"] = {"name": "copy", "metrics": {"psnr": {"mean": 3.0, "low": 3.0, "high": 3.0}}}
    night["num_images"] = 19
    page = report.build({}, evaluation, ())
    assert 'class="best"' not in page
    assert "<td>3.00</td>" in page  # of a single image there is no interval


def test_nothing_is_fetched_and_nothing_is_executed(run: Path, evaluation: dict[str, Any]) -> None:
    report.write_report(str(run), run_uri=str(run), evaluation=evaluation)
    page = (run / "report.html").read_text()
    assert not re.search(r'(?:src|srcset|href)="(?!data:)', page)
    assert "url(" not in page
    assert "@import" not in page
    assert "<script" not in page  # the one in the configuration is escaped


def test_a_run_that_has_hardly_begun_still_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"domains": ["a", "b"], "data": {"name": "mine"}}))
    (tmp_path / "metrics.jsonl").write_text("")
    report.write_report(str(tmp_path), run_uri=str(tmp_path))
    assert "mine: a ⇄ b" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_what_an_encoder_minimises_and_what_is_measured_of_it_are_drawn_apart(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    together, apart = "Loss: training, and validation", "Loss that training minimises"
    for method, there, not_there in (("diffusion", together, apart), ("identity", apart, together)):
        (run / "config.json").write_text(json.dumps({**config, "method": method}))
        report.write_report(str(run), run_uri=str(run))
        page = (run / "report.html").read_text()
        assert there in page
        assert not_there not in page
        assert ("compare it with itself only" in page) == (method == "identity")


def test_many_attributes_are_drawn_as_their_mean_and_odd_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []
    draw_lines = reports_charts.draw_lines

    def note(axes: Any, rows: Any, labels: Any, **options: Any) -> None:
        drawn.append([*labels.values()])
        draw_lines(axes, rows, labels, **options)

    monkeypatch.setattr(report, "draw_lines", note)
    for count, shown in ((2, ["accuracy", r"accuracy $\0$", r"accuracy $\1$"]), (40, ["accuracy"])):
        accuracies = {"accuracy": 0.5, **{rf"accuracy_$\{i}$": 0.5 for i in range(count)}}
        rows = [{"step": n, "split": "val", "loss": 1.0, **accuracies} for n in (1, 2)]
        drawn.clear()
        report.build({"rows": rows}, {}, [])
        assert drawn == [shown]


def test_a_film_of_large_images_is_reduced() -> None:
    grid = labelled_grid(["source", "translated"], [[picture(10, 256), picture(20, 256)]])
    columns, rows = ungrid(film_strip({50: grid, 100: grid}))
    assert columns == ["source", "50", "100"]
    assert [each.shape for each in rows[0]] == [(128, 128, 3)] * 3
    assert [each[0, 0, 0] for each in rows[0]] == [10, 20, 20]


def test_losses_that_fall_far_are_drawn_on_a_log_scale() -> None:
    from matplotlib.figure import Figure

    def scale(losses: list[float]) -> str:
        axes = Figure().add_subplot()
        reports_charts.draw_losses(axes, [{"images_seen": i, "loss": loss} for i, loss in enumerate(losses)], [])
        return axes.get_yscale()

    assert scale([1.0, 0.5, 0.01]) == "log"
    assert scale([1.0, 0.9, 0.8]) == "linear"


def test_a_wide_interval_does_not_flatten_the_curve() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    rows = [{"images_seen": n, "loss": loss, "loss_ci": 0.5} for n, loss in enumerate([1.0, 0.25, 0.1])]
    reports_charts.draw_losses(axes, [], rows)
    assert (axes.get_yscale(), axes.get_ylim()) == ("log", (pytest.approx(0.08), pytest.approx(1.25)))


def test_a_grid_has_headings_and_enlarged_images_in_order() -> None:
    png = labelled_grid(["source", "result"], [[picture(10), picture(20)], [picture(30), picture(40)]])
    grid = np.asarray(Image.open(io.BytesIO(png)))
    side = 128
    assert grid.shape == (HEADER + 2 * side + 4, 2 * side + 4, 3)
    assert grid[:HEADER].min() < 200  # the words
    centres = [[grid[HEADER + 64 + i * 132, 64 + j * 132, 0] for j in (0, 1)] for i in (0, 1)]
    assert centres == [[10, 20], [30, 40]]


def test_a_grid_can_be_taken_apart_again() -> None:
    rows = [[picture(10 * i + j) for j in range(3)] for i in range(2)]
    columns, cut = ungrid(labelled_grid(["source", "translated", "truth"], rows))
    assert columns == ["source", "translated", "truth"]
    np.testing.assert_array_equal(cut, rows)


def test_a_film_strip_shows_the_same_images_after_each_step() -> None:
    def grid(step: int) -> bytes:
        return labelled_grid(
            ["source", "translated", "truth"], [[picture(i), picture(step + i), picture(200 + i)] for i in range(6)]
        )

    columns, rows = ungrid(film_strip({step: grid(step) for step in (100, 50, 150)}))
    assert columns == ["source", "50", "100", "150", "truth"]
    assert [[int(cell[0, 0, 0]) for cell in row] for row in rows] == [
        [i, 50 + i, 100 + i, 150 + i, 200 + i] for i in range(FILM_ROWS)
    ]


STATUS = {
    "state": "running",
    "step": 20,
    "total": 30,
    "start": 10,
    "epoch": 2,
    "loss": 0.5,
    "images_per_s": 1234.5,
    "left_s": 200.0,
    "message": "",
    "at": "2026-01-02T04:04:05+00:00",
}


def facts_of(page: str) -> dict[str, str]:
    return dict(re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", page))


@pytest.mark.usefixtures("undrawn")
def test_a_running_runs_page_says_how_far_it_is_and_loads_itself_again(run: Path) -> None:
    (run / "best.json").write_text(
        json.dumps({"checkpoint": "checkpoints/step-20", "metric": {"loss": 0.55, "step": 20}})
    )
    attempts = [{"date": "2026-01-02T03:04:05+00:00", "step": 0}, *({"date": "", "step": step} for step in (5, 10))]
    (run / "environment.json").write_text(json.dumps({"attempts": attempts}))
    report.write_report(str(run), run_uri=str(run), status=STATUS)
    page = (run / "report.html").read_text()
    assert f'<meta http-equiv="refresh" content="{report.REFRESH_S}">' in page
    assert "<title>67% · earth: day → night</title>" in page
    assert '<h2 class="plain">Running</h2><progress value="20" max="30"' in page
    assert facts_of(page) == {
        "Step": "20 of 30",
        "Epoch": "2 of 3",
        "Images a second": "1,234",
        "Time left": "3 min 20 s",
        "Training loss": "0.5",
        "Best checkpoint": "checkpoints/step-20, validation loss 0.55",
        "Time in steps": "27 s",  # 1,920 images, 70 a second
        "Since the first start": "1 h 00 min",
        "Taken up again": "2 ×, at step 5, 10",
    }
    assert "As of 2026-01-02 04:04:05 UTC." in page


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("num", "told"), [(2, True), (19, True), (20, False), (None, False)])
def test_a_finished_run_says_on_how_few_images_its_checkpoint_was_chosen(
    run: Path, num: int | None, told: bool
) -> None:
    (run / "best.json").write_text(json.dumps({"checkpoint": "checkpoints/step-20", "metric": {"loss": 1, "step": 20}}))
    if num is not None:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [{**row, "num_images": num} if row["split"] == "val" else row for row in rows]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write_report(str(run), run_uri=str(run), status={**STATUS, "state": "finished"})
    page = (run / "report.html").read_text()
    assert '<h2 class="plain">Finished</h2>' in page  # an end is no success
    assert (f"The choice of the best checkpoint rests on {num} validation images: too few" in page) == told


@pytest.mark.parametrize(
    ("bands", "names"),
    [
        ((0, 2), ["t in quarter 1 (least noisy)", "t in quarter 3"]),
        ((1, 3), ["t in quarter 2", "t in quarter 4 (noisiest)"]),
        ((2,), ["t in quarter 3"]),
    ],
)
def test_a_band_is_called_by_its_place_in_the_chain(
    monkeypatch: pytest.MonkeyPatch, bands: tuple[int, ...], names: list[str]
) -> None:
    drawn: list[list[str]] = []
    monkeypatch.setattr(report, "draw_lines", lambda axes, rows, labels, **_: drawn.append([*labels.values()]))
    rows = [{"step": n, "split": "val", "loss": 1.0, **{f"loss_band_{i}": 1.0 for i in bands}} for n in (1, 2)]
    report.build({"rows": rows}, {}, [])
    assert drawn == [names]


@pytest.mark.parametrize("state", ["finished", "diverged", "interrupted", "failed"])
def test_a_run_that_has_ended_is_told_as_such(run: Path, state: str) -> None:
    (run / "metrics.jsonl").unlink()  # no curves to draw
    status = {**STATUS, "state": state, "step": 30, "message": "lower the <rate>", "warnings": ["MLflow: down"]}
    report.write_report(str(run), run_uri=str(run), status=status)
    page = (run / "report.html").read_text()
    assert "http-equiv" not in page
    assert "<progress" not in page
    assert f">{state.capitalize()}</h2>" in page
    assert ("lower the &lt;rate&gt;" in page, "MLflow: down" in page) == (True, True)
    assert ("Time left" in page, "Images a second</dt>" in page) == (False, False)


@pytest.mark.usefixtures("undrawn")
def test_the_fixed_images_are_shown_as_they_are_and_as_they_came_to_be(run: Path) -> None:
    for step in range(10, 110, 10):
        rows = [[picture(10), picture(step)], [picture(20), picture(step)]]
        storage.write_bytes(f"{run}/samples/step-{step:08d}.png", labelled_grid(["source", "translated"], rows))
    storage.write_bytes(f"{run}/samples/step-00000100.png.1234.tmp", b"half")
    report.write_report(str(run), run_uri=str(run), status=STATUS)
    page = (run / "report.html").read_text()
    assert "Validation images after 100 steps" in page
    grids = [png for png in embedded_pngs(page) if b"grid" in png[:200]]
    assert ungrid(grids[0])[1][0][1][0, 0, 0] == 100
    columns, rows = ungrid(grids[1])
    assert columns == ["source", "10", "30", "50", "60", "80", "100"]
    assert [int(cell[0, 0, 0]) for cell in rows[1]] == [20, 10, 30, 50, 60, 80, 100]


@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_of_a_run_does_not_show_the_images_of_its_training(run: Path) -> None:
    storage.write_bytes(f"{run}/samples/step-00000010.png", labelled_grid(["source"], [[picture(1)]]))
    report.write_report(str(run), run_uri=str(run))
    assert "Validation images" not in (run / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_report_that_cannot_be_written_leaves_the_old_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write_report(str(run), run_uri=str(run))
    before = (run / "report.html").read_text()
    monkeypatch.setattr(storage.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        report.write_report(str(run))
    assert (run / "report.html").read_text() == before
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize(
    ("metric", "heading", "column", "name"),
    [
        ("psnr", "PSNR to the truth, dB", "PSNR to the truth, dB ↑", "PSNR"),
        ("psnr_to_source", "PSNR to the source, dB", "PSNR to the source, dB", "PSNR to the source"),
        ("perceptual_to_proxy", "perceptual distance to the proxy", "perceptual distance to the proxy ↓", None),
        ("kid", "KID", "KID ↓", "KID"),
        ("copied", "copied from training", "copied from training", "copied from training"),
        ("colour_match", "colour match", "colour match ↑", "colour match"),
    ],
)
def test_a_metric_is_called_the_same_everywhere(metric: str, heading: str, column: str, name: str | None) -> None:
    assert (metric_table.heading(metric), metric_table.column(metric)) == (heading, column)
    assert metric_table.name(metric) == (name or heading)


# -- model cards --------------------------------------------------------------------------------------------------


def card_config(**changes: Any) -> dict[str, Any]:
    data = DataCard(name="earth", licence='CC0 "as is": <b>', content_hash="abc", pairing="paired")
    return configs.to_dict(ModelConfig(image_size=16, domains=("day", "night"), data=data, **changes))


VALIDATION = {"step": 20, "epoch": 2, "images_seen": 640, "loss": 0.25, "loss_ci": 0.03, "num_images": 8}


def front_matter(card: str) -> dict[str, str]:
    _, front, _ = card.split("---\n", 2)
    return dict(line.split(": ", 1) for line in front.splitlines())


@pytest.mark.parametrize("method", ["diffusion", "pix2pix", "cyclegan", "identity", "attributes"])
def test_a_card_says_what_a_checkpoint_is_and_what_it_is_not_for(method: str) -> None:
    environment = {
        "command": ["train", "--preset", "smoke", "--data", "/home/me/d", "--output=/home/me/o", "--epochs", "2"]
    }
    environment |= {"date": "2026-01-02T03:04:05", "source_hash": "beef", "git_commit": None, "python": "3.11"}
    card = model_card.build(card_config(method=method), environment, validation=VALIDATION, samples=["samples.png"])
    front = front_matter(card)
    assert front["license"] == "other"
    assert json.loads(front["license_name"]) == 'CC0 "as is": <b>'
    assert ("pipeline_tag" in front) == (method in ("diffusion", "pix2pix", "cyclegan"))
    for text in (
        "# earth: day / night",
        "Intended use, and limits",
        "loss 0.25 ± 0.03 (95 %) on 8 images",
        "](samples.png)",
    ):
        assert text in card
    assert "This rests on 8 validation images: too few" in card
    assert "`python -m jobs.train --preset smoke --epochs 2`" in card
    assert "/home/me" not in card
    assert ("checkpoint.load" in card) == ("pipeline_tag" in front)


def test_a_cards_example_is_python_and_its_figures_are_the_evaluations(evaluation: dict[str, Any]) -> None:
    whole = {**evaluation, "split": "test", "seed": 3, "data": {"name": "earth", "content_hash": "abc"}}
    card = model_card.build(card_config(target_domains=("night",)), {}, evaluation=whole)
    assert "| KID ↓ | 0.2000 (-0.8000 to 1.2000) | 0.3000 (-0.7000 to 1.3000) | 0.0100 (-0.9900 to 1.0100) |" in card
    assert "### To night, 123 images" in card
    assert "It beats a copy of the source in PSNR." in card
    assert "Validation only" not in card
    (example,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    compile(example, "card", "exec")
    assert not re.search("[{}]{2}|{%", card)
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
