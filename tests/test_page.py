"""The page, driven in a real browser: drop an image, see the translation, read what went wrong."""

import base64
import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, free_port
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from ddpm_core import checkpoint, images
from ddpm_core.config import SamplingConfig
from ddpm_core.translator import Translator
from serve import app

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not BROWSER or not DRIVER, reason="chromium and chromium-driver are not installed")


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, checkpoint_folder: str) -> Iterator[str]:
    import ray.serve

    port = free_port()
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = {"mark_key": "none", "checkpoint": checkpoint_folder, "device": "cpu", "precision": "fp32", "max_body_mb": 1}
    ray.serve.run(app.build_app(args), route_prefix="/demo")  # behind a prefix, as behind a reverse proxy
    yield f"http://127.0.0.1:{port}/demo"
    ray.serve.shutdown()


@pytest.fixture
def page(endpoint: str) -> Iterator[webdriver.Chrome]:
    profile = tempfile.mkdtemp(prefix="page")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    flags = (
        "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-quic no-first-run disable-sync "
        f"disable-background-networking disable-component-update window-size=1100,900 user-data-dir={profile}"
    )
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.get(endpoint)
    wait(lambda: text(driver, "about").startswith("A diffusion model"))
    yield driver
    driver.quit()
    shutil.rmtree(profile, ignore_errors=True)


def wait(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def text(page: webdriver.Chrome, name: str) -> str:
    return page.find_element(By.ID, name).text


def requested(page: webdriver.Chrome) -> set[str]:
    """Every URL that the page asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    return {
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    }


def pixels(page: webdriver.Chrome, canvas: str) -> np.ndarray:
    """A canvas of the page as h w 3."""
    script = f"return document.getElementById('{canvas}').toDataURL('image/png').split(',')[1]"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(page.execute_script(script)))).convert("RGB"))


def likeness(shown: np.ndarray, wanted: np.ndarray) -> float:
    """Correlation of what a square canvas shows, in its middle, with the image that it should be of."""
    height, width = wanted.shape[:2]
    side = len(shown)
    high, wide = (round(side * each / max(height, width)) for each in (height, width))
    top, left = (side - high) // 2, (side - wide) // 2
    shown = shown[top : top + high, left : left + wide]
    back = np.asarray(Image.fromarray(shown).resize((width, height), Image.Resampling.BOX))
    return float(np.corrcoef(back.ravel(), wanted.ravel())[0, 1])


def day_image(folder: Path) -> Path:
    """A real image: part of the Earth by day, wider than high."""
    path = folder / "day.png"
    with Image.open(ROOT / "jobs/datasets/sources/earth_maps/day.avif") as earth:
        earth.convert("RGB").crop((1000, 200, 1120, 280)).save(path)
    return path


def test_a_person_translates_a_image(page: webdriver.Chrome, checkpoint_folder: str, tmp_path: Path) -> None:
    assert not page.find_element(By.ID, "translate").is_enabled()
    assert "Licence of the training data" in text(page, "licence")
    source = day_image(tmp_path)
    page.find_element(By.ID, "file").send_keys(str(source))
    wait(lambda: "day.png · 120 × 80" in text(page, "source-note"))
    assert likeness(pixels(page, "source"), np.asarray(Image.open(source))) > 0.97

    page.find_element(By.CSS_SELECTOR, "#domains input[value=day]").send_keys(Keys.SPACE)
    page.find_element(By.ID, "guidance_scale").send_keys(Keys.ARROW_RIGHT)
    page.find_element(By.ID, "num_steps").send_keys(Keys.ARROW_RIGHT)
    page.find_element(By.ID, "seed").send_keys(Keys.ENTER)
    wait(lambda: text(page, "status").startswith("Done in"))
    assert text(page, "result-note") == "day · guidance 1.6 · 3 steps · seed 0"
    translate = Translator(checkpoint.load(checkpoint_folder), device="cpu", precision="fp32")
    (expected,) = translate.at_own_size([Image.open(source)], "day", guidance_scale=1.6, num_steps=3)
    assert likeness(pixels(page, "result"), expected) > 0.9

    link = page.find_element(By.ID, "download")
    assert link.is_displayed()
    assert link.get_attribute("download") == "day-day.png"
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    link.click()
    wait((tmp_path / "day-day.png").exists)
    with Image.open(tmp_path / "day-day.png") as saved:
        assert saved.size == (120, 80)
        assert np.abs(np.asarray(saved, int) - expected).max() <= 2  # the photo's own pixels, not the enlarged ones


def test_squares_can_be_had_as_well(page: webdriver.Chrome, checkpoint_folder: str, tmp_path: Path) -> None:
    source = day_image(tmp_path)
    page.find_element(By.ID, "file").send_keys(str(source))
    wait(lambda: "day.png · 120 × 80" in text(page, "source-note"))
    page.find_element(By.CSS_SELECTOR, "#more summary").send_keys(Keys.ENTER)
    page.find_element(By.ID, "output_size").send_keys("model")
    square = images.to_square(images.decode(source.read_bytes()), 16)
    wait(lambda: likeness(pixels(page, "source"), square) > 0.97)  # the centre square at the model's size
    page.find_element(By.ID, "seed").send_keys(Keys.ENTER)
    wait(lambda: text(page, "status").startswith("Done in"))
    translate = Translator(checkpoint.load(checkpoint_folder), device="cpu", precision="fp32")
    expected = translate(square[None], "night")[0]
    assert likeness(pixels(page, "result"), expected) > 0.9


def test_results_are_compared_kept_and_repeated_by_a_command(page: webdriver.Chrome, tmp_path: Path) -> None:
    day_image(tmp_path)

    def translate(seed: int) -> np.ndarray:
        page.find_element(By.ID, "seed").send_keys(Keys.CONTROL, "a")
        page.find_element(By.ID, "seed").send_keys(str(seed), Keys.ENTER)
        wait(lambda: text(page, "result-note").endswith(f"seed {seed}"))
        return pixels(page, "result")

    page.find_element(By.ID, "file").send_keys(str(tmp_path / "day.png"))
    wait(lambda: "day.png" in text(page, "source-note"))
    first, second = translate(0), translate(1)
    assert not np.array_equal(first, second)

    compare = page.find_element(By.ID, "compare")
    assert compare.accessible_name
    compare.send_keys(*[Keys.ARROW_RIGHT] * 5)
    assert page.execute_script("return getComputedStyle(document.getElementById('before')).clipPath").startswith(
        "inset"
    )
    assert page.execute_script("return document.getElementById('outcome').style.getPropertyValue('--cut')") == "30%"
    assert np.array_equal(pixels(page, "before"), pixels(page, "source"))
    page.save_screenshot(str(tmp_path / "wide.png"))

    newer, older = page.find_elements(By.CSS_SELECTOR, "#past button")
    assert newer.get_attribute("aria-current") == "true"
    older.send_keys(Keys.ENTER)
    wait(lambda: text(page, "result-note").endswith("seed 0"))
    assert np.array_equal(pixels(page, "result"), first)

    page.find_element(By.CSS_SELECTOR, "#request summary").send_keys(Keys.ENTER)
    command = shlex.split(text(page, "curl"))
    subprocess.run([*command, "-s"], cwd=tmp_path, check=True, timeout=300)
    newer.send_keys(Keys.ENTER)
    wait(lambda: text(page, "result-note").endswith("seed 1"))
    address = page.find_element(By.ID, "download").get_attribute("href")
    file = page.execute_async_script(
        "const [url, end] = arguments, image = new Image();"
        "image.onload = () => { const paper = Object.assign(document.createElement('canvas'),"
        "{width: image.width, height: image.height}); paper.getContext('2d').drawImage(image, 0, 0);"
        "end(paper.toDataURL('image/png').split(',')[1]); }; image.src = url;",
        address,
    )
    with Image.open(tmp_path / "result.png") as by_curl, Image.open(io.BytesIO(base64.b64decode(file))) as by_page:
        difference = np.asarray(by_curl, int) - np.asarray(by_page.convert("RGB"), int)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_either_light(page: webdriver.Chrome, tmp_path: Path, scheme: str) -> None:
    phone = {"width": 375, "height": 812, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.refresh()
    wait(lambda: text(page, "about").startswith("A diffusion model"))
    assert page.find_element(By.ID, "photo").is_displayed()  # a phone has a camera
    assert page.find_element(By.ID, "camera").get_attribute("capture") == "environment"
    page.find_element(By.ID, "camera").send_keys(str(day_image(tmp_path)))
    wait(lambda: "day.png" in text(page, "source-note"))
    page.execute_script("document.getElementById('translate').click()")
    wait(lambda: text(page, "status").startswith("Done in"))
    page.find_element(By.CSS_SELECTOR, "#request summary").send_keys(Keys.ENTER)
    assert page.execute_script("return document.documentElement.scrollWidth") == 375
    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 380) == (scheme == "light")
    assert "generated" in text(page, "generated")
    data = page.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})["data"]
    (tmp_path / f"{scheme}.png").write_bytes(base64.b64decode(data))


def test_every_sampling_option_has_a_control_and_a_changed_one_reaches_the_query(
    page: webdriver.Chrome, tmp_path: Path
) -> None:
    summary = page.find_element(By.CSS_SELECTOR, "#more summary")
    assert not page.find_element(By.ID, "sampler").is_displayed()
    summary.send_keys(Keys.ENTER)
    for name in [field.name for field in dataclasses.fields(SamplingConfig)]:
        control = page.find_element(By.ID, name)
        assert control.is_displayed(), name
        assert control.get_attribute("name") == name
        assert control.accessible_name, name
    for control, value in {"eta": "0.5", "guidance_interval-1": "0.75"}.items():
        page.find_element(By.ID, control).send_keys(Keys.CONTROL, "a")
        page.find_element(By.ID, control).send_keys(value)
    summary.send_keys(Keys.ENTER)  # what is folded away still holds
    page.find_element(By.ID, "file").send_keys(str(day_image(tmp_path)))
    wait(lambda: "day.png" in text(page, "source-note"))
    page.find_element(By.ID, "seed").send_keys(Keys.ENTER)
    wait(lambda: text(page, "status").startswith("Done in"))
    assert text(page, "status").endswith("with eta 0.5, guidance_interval 0,0.75.")
    (query,) = [
        urllib.parse.parse_qs(urllib.parse.urlsplit(url).query) for url in requested(page) if "/v1/translate" in url
    ]
    assert query == {"domain": ["night"], "seed": ["0"], "eta": ["0.5"], "guidance_interval": ["0", "0.75"]}


def test_a_dropped_image_is_taken_and_what_is_wrong_is_said(page: webdriver.Chrome, tmp_path: Path) -> None:
    drop = """
      const files = new DataTransfer();
      files.items.add(new File([new Uint8Array(arguments[1])], arguments[0]));
      document.getElementById("drop").dispatchEvent(
        new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
    """

    def shown() -> list[bool]:
        return [page.find_element(By.ID, name).is_displayed() for name in ("source", "result", "download")]

    page.execute_script(drop, "day.png", list(day_image(tmp_path).read_bytes()))
    wait(lambda: "day.png" in text(page, "source-note"))
    page.find_element(By.ID, "translate").click()
    wait(lambda: text(page, "status").startswith("Done in"))
    assert shown() == [True, True, True]
    page.execute_script(drop, "notes.txt", list(b"no image at all"))
    wait(lambda: "cannot show it" in text(page, "source-note"))
    assert shown() == [False, False, False]  # nothing of the image before stays
    assert text(page, "result-note") == ""
    page.find_element(By.ID, "translate").click()
    wait(lambda: "not an image" in text(page, "status"))
    assert "bad" in page.find_element(By.ID, "status").get_attribute("class")
    assert page.find_element(By.ID, "translate").is_enabled()
    page.execute_script(drop, "day.png", list(day_image(tmp_path).read_bytes()))
    wait(lambda: shown()[0])
    page.execute_script(drop, "large.png", [0] * 1_000_001)
    wait(lambda: "larger than 1 MB" in text(page, "status"))
    assert shown() == [False, False, False]
    assert not page.find_element(By.ID, "translate").is_enabled()


def test_an_image_is_pasted_from_the_clipboard(page: webdriver.Chrome, endpoint: str, tmp_path: Path) -> None:
    """Of text nothing is taken."""
    page.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"origin": endpoint.removesuffix("/demo"), "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    copy = """
      const [kind, content, end] = arguments;
      const blob = new Blob([new Uint8Array(content)], {type: kind});
      navigator.clipboard.write([new ClipboardItem({[kind]: blob})]).then(() => end(""), (error) => end(`${error}`));
    """

    def paste(kind: str, content: bytes) -> None:
        assert page.execute_async_script(copy, kind, list(content)) == ""
        pressed = {"key": "v", "code": "KeyV", "modifiers": 2, "commands": ["paste"]}  # Ctrl
        for phase in ("keyDown", "keyUp"):
            page.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": phase, **pressed})

    source = day_image(tmp_path)
    paste("image/png", source.read_bytes())
    wait(lambda: "120 × 80" in text(page, "source-note"))
    shown = pixels(page, "source")
    assert likeness(shown, np.asarray(Image.open(source))) > 0.97
    paste("text/plain", b"no image")
    page.find_element(By.ID, "translate").click()
    wait(lambda: text(page, "status").startswith("Done in"))
    assert np.array_equal(pixels(page, "source"), shown)
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_page_asks_nobody_but_the_endpoint(page: webdriver.Chrome, endpoint: str) -> None:
    asked = requested(page)
    assert {url for url in asked if not url.startswith((endpoint, "data:", "chrome"))} == set()
    assert f"{endpoint}/v1/model" in asked
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
