"""The page in a real browser (Debian's Chromium with playwright): visits as people make them, on a tiny model.

Screenshots are kept in build/test_demo. Without a Chromium these tests are skipped; `.ci/run` installs one.
"""

import base64
import gc
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import weakref
import zipfile
from pathlib import Path

import fake_hub
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from scans import SHAPE, make_scan, write_series, zip_folder

from hsenet import HSENetProcessor, read_volume
from hsenet.encoded_scan import EncodedScan
from hsenet.index import SearchIndex


gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "build" / "test_demo"
CHROMIUM = os.environ.get("HSENET_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
NAME = "DOE_JANE"
FIRST, SECOND = "Is there a pericardial effusion?", "Is there a nodule of 12 mm?"
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: install it, or name it in HSENET_CHROMIUM")


def build_index(folder: Path) -> tuple[Path, Path]:
    """Two patients, and a report that would run if the page took it for HTML."""
    model = folder / "clip"
    tiny.clip_model("slices").save_pretrained(model)
    HSENetProcessor(tiny.image_processor(), tiny.tokenizer()).save_pretrained(model)
    tiny.write_scan(folder / "a.nii.gz", (0,))
    tiny.write_scan(folder / "b.nii.gz", (0, 1))
    rows = [
        'a.nii.gz,one,061Y,"<img src=x onerror=""window.taken=1"">A nodule.",Lung nodule',
        "b.nii.gz,two,,No effusion.,",
    ]
    table = folder / "scans.csv"
    table.write_text("\n".join(["volume,patient_id,age,findings,labels", *rows]) + "\n")
    SearchIndex.build(folder / "index", table, model, cache_dir=folder / "cache")
    return folder / "index", model


class Site:
    """The page as it is served, and what it was made of."""

    def __init__(self, folder: Path):
        import app
        from assistant import Assistant

        self.uploads, model = folder / "uploads", folder / "model"
        self.uploads.mkdir()
        samples = folder / "samples"
        samples.mkdir()
        tiny.write_scan(samples / "straight.nii.gz")
        tiny.write_scan(samples / "turned.nii.gz", (1,))
        tiny.save_generation(model)
        index, index_model = build_index(folder)
        os.environ["GRADIO_TEMP_DIR"] = str(self.uploads)
        settings = {"index": str(index), "index_model": str(index_model), "samples": str(samples)}
        self.assistant = Assistant.load(str(model), max_new_tokens=24, min_new_tokens=24, **settings)
        self.page = app.build_page(self.assistant)
        _, self.address, _ = app.launch(self.page, server_name="127.0.0.1")
        self.assistant.claims_come_within = 0.5
        self.encoded: list[str] = []
        for name in ("global_encoder", "local_encoder", "slice_encoder"):
            encoder = getattr(self.assistant.model.model, name)
            encoder.register_forward_hook(lambda *_, name=name: self.encoded.append(name))
        # A token takes some time, as it does with a model of true size.
        self.tokens = 0
        self.assistant.model.lm_head.register_forward_hook(self._slowly)

    def _slowly(self, *_) -> None:
        self.tokens += 1
        time.sleep(0.02)

    def keeps_no_upload(self) -> bool:
        """Gradio itself makes empty files with random names."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            files = [path for path in self.uploads.rglob("*") if path.is_file()]
            if not any(path.stat().st_size or "DOE" in str(path) for path in files):
                return True
            time.sleep(0.1)
        return False

    def says(self, file: Path, question: str) -> str:
        scan = EncodedScan.read(self.assistant.model, self.assistant.processor, str(file))
        return scan.ask(question, **self.assistant.generate_kwargs)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "demo"))
        patch.setenv("GRADIO_TEMP_DIR", "")
        site = Site(tmp_path_factory.mktemp("site"))
        yield site
        site.page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """A browser of its own, and what its user sees."""

    def __init__(self, browser, site: Site, **device):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **device})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.troubles: list[str] = []
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.asked_elsewhere: list[str] = []
        self.page.on("request", lambda request: self._note(request.url, site.address))
        self.page.goto(site.address)
        self.page.wait_for_selector("#samples")

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.asked_elsewhere.append(url)

    def pick(self, name: str) -> None:
        before = self.picture_source("axial")
        self.page.locator("#samples").get_by_text(name, exact=True).click()
        self.wait_for_other_picture("axial", before)

    def upload(self, path: Path) -> None:
        self.page.locator("#upload input[type=file]").set_input_files(path)

    def status(self, word: str) -> str:
        return self.page.locator("#status").filter(has_text=word).inner_text()

    def picture_source(self, plane: str) -> str | None:
        image = self.page.locator(f"#{plane}-picture img")
        return image.get_attribute("src") if image.count() else None

    def wait_for_picture(self, plane: str, source: str) -> None:
        shown = "([plane, source]) => { const i = document.querySelector(`#${plane}-picture img`);"
        self.page.wait_for_function(shown + " return i && i.src === source }", arg=[plane, source])

    def wait_for_other_picture(self, plane: str, before: str | None) -> None:
        changed = "([plane, before]) => { const i = document.querySelector(`#${plane}-picture img`);"
        self.page.wait_for_function(changed + " return i && i.src !== before }", arg=[plane, before])

    def picture(self, plane: str) -> np.ndarray:
        """Pixels of the slice that is shown."""
        content = base64.b64decode(self.picture_source(plane).split(",")[1])
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(float)

    def caption(self, plane: str) -> str:
        return self.page.locator(f"#{plane}-picture figcaption").inner_text()

    def report(self) -> str:
        return self.page.locator("#report textarea").input_value()

    def start_report(self) -> None:
        self.page.get_by_role("button", name="Write report").click()
        self.page.wait_for_function("document.querySelector('#report textarea').value.length > 0")

    def wait_until_silent(self) -> None:
        """The model has said all."""
        text, since = None, time.monotonic()
        while time.monotonic() - since < 1.0:
            self.page.wait_for_timeout(100)
            now = self.report() + self.page.locator("#chat").inner_text()
            if now != text:
                text, since = now, time.monotonic()

    def ask(self, question: str) -> str:
        answers = self.page.locator("#chat .bot.message")
        count = answers.count()
        self.page.locator("#question textarea").fill(question)
        self.page.keyboard.press("Enter")
        self.page.wait_for_function(
            "count => document.querySelectorAll('#chat .bot.message').length > count", arg=count
        )
        self.wait_until_silent()
        return answers.last.inner_text().strip()

    def keep(self, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


@pytest.fixture
def visit(browser, site):
    """Visitors, who must meet no error of the page's scripts and make their browsers ask nobody else."""
    visitors = []

    def come(**device) -> Visitor:
        visitors.append(Visitor(browser, site, **device))
        return visitors[-1]

    yield come
    for visitor in visitors:
        visitor.context.close()
        assert not visitor.troubles and not visitor.asked_elsewhere


@in_browser
def test_a_scan_is_looked_at_in_three_planes(visit, site):
    from assistant import Wish
    from viewer import WINDOWS

    visitor = visit()
    visitor.pick("straight")
    assert "10 × 40 × 36 voxels · 10.00 × 8.00 × 8.00 mm" in visitor.status("voxels")
    volume = site.assistant.fulfil(Wish(sample="straight")).volume
    for plane, axis in (("axial", 0), ("coronal", 1), ("sagittal", 2)):
        count = volume.array.shape[axis]
        assert f"{(count + 1) // 2} / {count}" in visitor.caption(plane)
        before = visitor.picture_source(plane)
        visitor.page.locator(f"#{plane} input[type=range]").press("ArrowRight")
        visitor.wait_for_other_picture(plane, before)
        index = (count + 1) // 2  # the next one
        assert f"{index + 1} / {count}" in visitor.caption(plane)
        lowest, highest = WINDOWS["Lung"]
        shown = volume.array.take(index, axis=axis)
        grey = np.clip((shown - lowest) / (highest - lowest), 0, 1) * 255
        grey = grey if plane == "axial" else grey[::-1]  # the head is up
        picture = visitor.picture(plane)
        small = np.asarray(Image.fromarray(picture[..., 0].astype(np.uint8)).resize(grey.shape[::-1], Image.BOX))
        assert np.abs(small - grey).mean() < 12 and np.corrcoef(small.ravel(), grey.ravel())[0, 1] > 0.95
    before, lung = visitor.picture_source("axial"), visitor.picture("axial").mean()
    visitor.page.locator("#window").get_by_text("Soft tissue").click()
    visitor.wait_for_other_picture("axial", before)
    assert visitor.picture("axial").mean() < lung - 10
    before = visitor.picture_source("axial")
    assert np.ptp(visitor.picture("axial"), axis=-1).max() < 8  # grey
    visitor.page.locator("#overlay input").check()
    visitor.wait_for_other_picture("axial", before)
    assert np.ptp(visitor.picture("axial"), axis=-1).max() > 60  # coloured
    visitor.keep("planes")


@in_browser
def test_a_report_is_streamed_and_questions_encode_nothing_again(visit, site, tmp_path):
    from assistant import REPORT_REQUEST

    visitor = visit()
    site.encoded.clear()
    visitor.pick("turned")
    assert sorted(site.encoded) == ["global_encoder", "local_encoder", "slice_encoder"]
    seen = (
        "window.seen = []; setInterval(() => window.seen.push(document.querySelector('#report textarea').value), 30)"
    )
    visitor.page.evaluate(seen)
    visitor.start_report()
    visitor.wait_until_silent()
    texts = visitor.page.evaluate("[...new Set(window.seen)].filter(text => text)")
    assert len(texts) > 3 and all(later.startswith(text) for text, later in zip(texts, texts[1:], strict=False))
    answers = [visitor.ask(question) for question in (FIRST, SECOND)]
    assert len(site.encoded) == 3
    file = tiny.write_scan(tmp_path / "turned.nii.gz", (1,))
    expected = [site.says(file, question) for question in (REPORT_REQUEST, FIRST, SECOND)]
    assert [visitor.report(), *answers] == expected and len(set(expected)) == 3
    visitor.keep("report_and_questions")


@in_browser
def test_an_upload_is_read_and_deleted_and_a_broken_one_refused(visit, site, tmp_path):
    visitor = visit()
    visitor.pick("turned")
    before = visitor.picture_source("axial")
    visitor.upload(tiny.write_scan(tmp_path / f"{NAME}.nii.gz"))
    visitor.wait_for_other_picture("axial", before)
    assert visitor.page.locator("#samples input:checked").count() == 0  # so that it can be picked again
    assert "10 × 40 × 36 voxels" in visitor.status("voxels")
    assert site.keeps_no_upload()
    visitor.start_report()
    visitor.wait_until_silent()
    assert [visitor.ask(FIRST), visitor.ask(SECOND)] == [
        site.says(tmp_path / f"{NAME}.nii.gz", question) for question in (FIRST, SECOND)
    ]
    broken = tmp_path / f"{NAME}_broken.nii.gz"
    broken.write_bytes((tmp_path / f"{NAME}.nii.gz").read_bytes()[:4000])
    visitor.upload(broken)
    said = visitor.status("refused")
    assert re.search("cut off|truncated|ends|incomplete", said) and NAME not in said
    assert visitor.picture_source("axial") is None  # nothing is left of the scan before
    assert visitor.page.get_by_role("button", name="Write report").is_disabled()
    assert site.keeps_no_upload()
    visitor.keep("refused")
    visitor.pick("turned")
    assert visitor.picture_source("axial") == before


@in_browser
def test_a_zip_with_two_series_is_refused_until_one_is_chosen(visit, site, tmp_path):
    for number, array in enumerate((make_scan(), make_scan()[2:])):
        (tmp_path / "study" / str(number)).mkdir(parents=True)
        write_series(tmp_path / "study" / str(number), array)
    archive = zip_folder(tmp_path / "study", tmp_path / f"{NAME}.zip", compression=zipfile.ZIP_DEFLATED)
    visitor = visit()
    visitor.upload(archive)
    said = visitor.status("refused")
    assert "got 2 groups of slices" in said and "DOE" not in said
    visitor.page.get_by_text("If a scan is refused").click()
    visitor.page.locator("#series textarea").fill("1")
    visitor.upload(archive)
    assert re.search(f"^(12|10) × {SHAPE[1]} × {SHAPE[2]} voxels", visitor.status("voxels"))
    assert site.keeps_no_upload()


@in_browser
def test_two_visitors_at_once_do_not_mix(visit, site, tmp_path):
    from assistant import REPORT_REQUEST

    visitors = {"straight": visit(), "turned": visit()}
    for name, visitor in visitors.items():
        visitor.pick(name)
    for visitor in visitors.values():
        visitor.page.get_by_role("button", name="Write report").click()
    flips = {"straight": (), "turned": (1,)}
    expected = {
        name: site.says(tiny.write_scan(tmp_path / f"{name}.nii.gz", turned), REPORT_REQUEST)
        for name, turned in flips.items()
    }
    for name, visitor in visitors.items():
        visitor.page.wait_for_function(
            "text => document.querySelector('#report textarea').value === text", arg=expected[name]
        )
    assert expected["straight"] != expected["turned"]
    # Both upload the same file, which Gradio keeps in one place.
    same = tiny.write_scan(tmp_path / f"{NAME}.nii.gz", (2,))
    for visitor in visitors.values():
        visitor.pick("straight" if visitor is visitors["turned"] else "turned")
    before = {name: visitor.picture_source("axial") for name, visitor in visitors.items()}
    for visitor in visitors.values():
        visitor.upload(same)
    for name, visitor in visitors.items():
        visitor.wait_for_other_picture("axial", before[name])
        assert "voxels" in visitor.status("voxels")
    assert site.keeps_no_upload()


@pytest.fixture
def long_texts(site, monkeypatch) -> None:
    """Of four seconds."""
    monkeypatch.setattr(site.assistant, "generate_kwargs", {"max_new_tokens": 200, "min_new_tokens": 200})


@in_browser
def test_what_is_picked_next_ends_what_is_said(visit, site, long_texts):
    visitor = visit()
    visitor.pick("straight")
    picture = visitor.picture_source("axial")
    visitor.start_report()
    site.tokens = 0
    visitor.pick("turned")
    visitor.page.wait_for_timeout(500)
    assert site.tokens < 100 and visitor.report() == "" and visitor.picture_source("axial") != picture


@in_browser
def test_of_two_quick_choices_the_second_is_shown(visit, site):
    visitor = visit()
    visitor.pick("turned")
    turned = visitor.picture_source("axial")
    choices = visitor.page.locator("#samples")
    for name in ("Phantom 1", "straight", "Phantom 2", "turned"):
        choices.get_by_text(name, exact=True).click()
    visitor.wait_for_picture("axial", turned)
    visitor.page.wait_for_timeout(3000)
    assert visitor.picture_source("axial") == turned and "10 × 40 × 36" in visitor.status("voxels")


@in_browser
def test_stop_frees_the_model(visit, site, long_texts):
    visitor = visit()
    visitor.pick("straight")
    visitor.start_report()
    visitor.page.get_by_role("button", name="Stop").click()
    site.tokens = 0
    visitor.page.wait_for_timeout(1000)
    assert site.tokens < 100
    site.assistant.generate_kwargs = {"max_new_tokens": 3}
    assert visitor.ask(FIRST)


@in_browser
def test_nothing_of_one_scan_comes_under_another(visit, site, long_texts):
    visitor, other = visit(), visit()
    for one in (visitor, other):
        one.pick("straight")
    site.assistant.generate_kwargs = {"max_new_tokens": 3}
    visitor.ask(FIRST)
    site.assistant.generate_kwargs = {"max_new_tokens": 100, "min_new_tokens": 100}
    other.start_report()  # the model is busy
    visitor.page.locator("#samples").get_by_text("turned", exact=True).click()
    visitor.status("Opening")
    assert visitor.page.locator("#chat .message").count() == 0 and visitor.picture_source("axial") is None
    assert visitor.page.get_by_role("button", name="Write report").is_disabled()
    visitor.wait_for_other_picture("axial", None)
    site.assistant.generate_kwargs = {"max_new_tokens": 3}
    visitor.ask(SECOND)
    assert visitor.page.locator("#chat .message").count() == 2


@in_browser
def test_a_scan_is_forgotten_with_its_page_and_the_visitor_is_told(visit, site):
    from assistant import OpenScan

    def scans() -> list[OpenScan]:
        gc.collect()
        return [one for one in gc.get_objects() if isinstance(one, OpenScan)]

    def has_new() -> bool:
        return any(one not in others for one in scans())

    others = weakref.WeakSet(scans())  # of visitors before, some of whom are just being forgotten
    visitor = visit()
    visitor.pick("straight")
    assert has_new()
    for session in list(site.page.state_holder.session_data):  # as after half an hour
        site.page.state_holder.delete_state(session)
    visitor.page.get_by_role("button", name="Write report").click()
    visitor.page.get_by_text("no longer in the server's memory").first.wait_for()
    visitor.pick("turned")
    assert has_new()
    visitor.page.close()
    deadline = time.monotonic() + 15
    while has_new() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not has_new()


@in_browser
def test_the_memory_for_scans_has_an_end(visit, site, monkeypatch):
    monkeypatch.setattr(site.assistant, "max_bytes", 1000)
    visitor = visit()
    visitor.page.locator("#samples").get_by_text("straight", exact=True).click()
    assert "come again later" in visitor.status("refused")


@in_browser
def test_what_is_said_is_shown_as_text(visit):
    visitor = visit()
    visitor.pick("straight")
    said = visitor.ask("What is <image>?")
    assert "Not asked." in said and "<image>" in said
    assert "What is <image>?" in visitor.page.locator("#chat .user.message").inner_text()


def test_what_uploads_leave_behind_is_swept(site, tmp_path):
    import app

    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scan.nii").write_bytes(b"CT")
        (tmp_path / f"broken_{name}").write_bytes(b"CT")
    for name in ("old", "broken_old"):
        os.utime(tmp_path / name, (0, 0))
    app.sweep(tmp_path, 60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken_new", "new"]


def test_samples_have_names_of_their_own(site, tmp_path):
    from assistant import Assistant, sample_files

    for name in ("nodule_3.5mm.nii.gz", "nodule_3.8mm.NII.GZ", "notes.txt"):
        (tmp_path / name).touch()
    assert [sample.name for sample in sample_files(tmp_path)] == ["nodule_3.5mm", "nodule_3.8mm"]
    (tmp_path / "nodule_3.5mm.nrrd").touch()
    with pytest.raises(ValueError, match="same name"):
        Assistant(site.assistant.model, site.assistant.processor, samples=sample_files(tmp_path))


@in_browser
def test_similar_scans_are_text(visit):
    visitor = visit()
    visitor.pick("straight")
    visitor.page.get_by_role("button", name="Find similar scans").click()
    found = visitor.page.locator("#nearest li")
    found.first.wait_for()
    assert found.count() == 2 and "A nodule." in visitor.page.locator("#nearest").inner_text()
    assert "<img src=x" in visitor.page.locator("#nearest").inner_text()  # shown, not run
    assert visitor.page.evaluate("window.taken") is None
    visitor.keep("similar")


@in_browser
def test_a_phone(visit):
    visitor = visit(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    visitor.page.locator("#samples").get_by_text("straight").tap()
    visitor.wait_for_other_picture("axial", None)
    visitor.page.get_by_role("button", name="Write report").tap()
    visitor.page.wait_for_function("document.querySelector('#report textarea').value.length > 0")
    width = visitor.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360, f"the page is {width} pixels wide"
    for plane in ("axial", "coronal", "sagittal"):
        assert visitor.page.locator(f"#{plane}-picture img").bounding_box()["width"] > 250
    visitor.keep("phone")


@in_browser
def test_a_keyboard_is_enough(visit):
    visitor = visit()
    keyboard = visitor.page.keyboard

    def tab_to(selector: str) -> None:
        for _ in range(40):
            keyboard.press("Tab")
            if visitor.page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} is not reached")

    tab_to("#samples input")
    keyboard.press("Space")
    visitor.wait_for_other_picture("axial", None)
    before = visitor.picture_source("axial")
    tab_to("#window label:nth-of-type(2) input")
    keyboard.press("Space")
    visitor.wait_for_other_picture("axial", before)
    tab_to("#overlay input")
    before = visitor.picture_source("axial")
    keyboard.press("Space")
    visitor.wait_for_other_picture("axial", before)
    tab_to("#sagittal input[type=range]")
    before = visitor.picture_source("sagittal")
    keyboard.press("ArrowLeft")
    visitor.wait_for_other_picture("sagittal", before)
    tab_to("#write")
    keyboard.press("Enter")
    visitor.page.wait_for_function("document.querySelector('#report textarea').value.length > 0")
    visitor.wait_until_silent()
    tab_to("#question textarea")
    keyboard.type(FIRST)
    keyboard.press("Enter")
    visitor.page.wait_for_selector("#chat .bot.message")
    nameless = """[...document.querySelectorAll('input:not([type=file]), textarea, button')].filter(one =>
        one.checkVisibility() && !(one.labels && one.labels.length) && !one.ariaLabel && !one.title
        && !one.innerText.trim()).map(one => one.outerHTML.slice(0, 120))"""
    assert visitor.page.evaluate(nameless) == []


@in_browser
def test_limits_are_in_sight(visit):
    visitor = visit()
    notice = visitor.page.get_by_role("note")
    assert "Not a medical device" in notice.inner_text() and notice.bounding_box()["y"] < 300
    assert "not where a finding lies" in visitor.page.locator(".limits").inner_text()


@pytest.mark.parametrize(("plane", "rows", "columns"), [("axial", 0, 0), ("coronal", 1, 0), ("sagittal", 1, 0)])
def test_scores_lie_where_they_belong(site, plane, rows, columns):
    """The patch where all axes begin, right, anterior, inferior, is in this quarter, in pictures of the first half."""
    import viewer

    grey = np.linspace(-310.0, -290.0, 16 * 32 * 48).reshape(16, 32, 48)
    volume = read_volume(grey, spacing=(3.0, 1.5, 1.0), hu_check="warn")
    scores = torch.zeros(2, 2, 2)
    scores[0, 0, 0] = 1
    overlay = viewer.Overlay(scores, [(0.0, float(size)) for size in volume.array.shape])
    for index in (2, volume.array.shape[viewer.PLANES[plane].axis] - 3):
        picture = viewer.render(volume, plane, index, (-1000.0, 400.0), overlay, opacity=0.9)
        hot = np.asarray(picture).astype(int)[..., 0] > 150
        quarters = np.array(
            [[half.mean() for half in np.array_split(band, 2, axis=1)] for band in np.array_split(hot, 2)]
        )
        expected = np.zeros((2, 2))
        expected[rows, columns] = index == 2
        np.testing.assert_allclose(quarters, expected, atol=0.02)


# The Space


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    """Its files as `deploy.py` collects them."""
    folder = tmp_path_factory.mktemp("deployed") / "space"
    command = [sys.executable, ROOT / "demo" / "deploy.py", "--folder", folder]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    return folder


def test_a_space_stands_on_its_own(space, site, tmp_path):
    """From its folder and its variables alone, with this checkout out of reach."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shutil.copytree(site.uploads.parent / "model", tmp_path / "model")
    program = f"""
import runpy, sys
sys.path = [{str(space)!r}] + [folder for folder in sys.path if folder not in ("", {str(ROOT)!r})]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.argv = ["app.py", "--host", "127.0.0.1", "--port", "{port}"]
import hsenet
assert hsenet.__file__.startswith({str(space)!r}), hsenet.__file__
runpy.run_path({str(space / "app.py")!r}, run_name="__main__")
"""
    environment = {**os.environ, "HSENET_MODEL": str(tmp_path / "model"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    (tmp_path / "temporary").mkdir()
    environment["TMPDIR"] = str(tmp_path / "temporary")
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 60
        while "The page is at" not in (tmp_path / "log").read_text():
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.3)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as answer:
            assert "Phantom 1" in json.dumps(json.load(answer))
        form = (
            f'--part\r\nContent-Disposition: form-data; name="files"; filename="{NAME}.nii"\r\n\r\nCT\r\n--part--\r\n'
        )
        headers = {"Content-Type": "multipart/form-data; boundary=part"}
        address = f"http://127.0.0.1:{port}/gradio_api/upload"
        urllib.request.urlopen(urllib.request.Request(address, form.encode(), headers)).close()
        assert list((tmp_path / "temporary").rglob(f"{NAME}.nii"))
    finally:
        server.terminate()
        server.wait(20)
    assert not list((tmp_path / "temporary").rglob(f"{NAME}*"))  # though nobody opened it


def test_a_space_installs_what_the_extra_says():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, needed, waiting = project["optional-dependencies"], set(project["dependencies"]), ["demo"]
    while waiting:
        for requirement in extras[waiting.pop()]:
            inner = re.fullmatch(r"hsenet\[(.*)\]", requirement)
            waiting += inner[1].split(",") if inner else []
            needed |= set() if inner else {requirement}
    sdk = re.search(r"sdk_version: (\S+)", (ROOT / "demo" / "README.md").read_text())[1]
    [version] = [requirement for requirement in needed if requirement.startswith("gradio")]
    assert re.fullmatch(r"gradio>=(\d+)\.\d+,<\d+", version)[1] == sdk.split(".")[0]
    assert set((ROOT / "demo" / "requirements.txt").read_text().split()) == needed - {version}


DEPLOY = """
import json, runpy, sys
for options in json.loads(sys.argv.pop()):
    sys.argv[1:] = options
    try:
        runpy.run_path("demo/deploy.py", run_name="__main__")
    except SystemExit as end:
        print(end.code)
"""


def test_a_space_is_one_private_commit(tmp_path):
    def deploy(*runs: list[str]) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **hub.environment(tmp_path / "home")}
        command = [sys.executable, "-c", DEPLOY, json.dumps(runs)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    pinned = ["someone/demo", "--model", "someone/reports", "--revision", "0" * 40]
    with fake_hub.Hub() as hub:
        first = deploy(pinned)
        assert first.returncode == 0, first.stderr
        space = hub.repositories["spaces/someone/demo"]
        assert space.private and len(space.commits) == 2  # the empty one that a repository begins with, and ours
        assert space.variables == {"HSENET_MODEL": "someone/reports", "HSENET_REVISION": "0" * 40}
        old = fake_hub.File(b"")
        space.commit("main", {**space.commits[space.resolve("main")], "old.py": old, "samples/scan.nii.gz": old})
        later = deploy(["someone/demo", "--model", "someone/other"], ["nobody/demo", "--model", "someone/other"])
    assert space.variables == {"HSENET_MODEL": "someone/other"}
    files = set(space.files())
    assert {
        "app.py",
        "style.css",
        "README.md",
        "requirements.txt",
        "hsenet/__init__.py",
        "modeling_hsenet.py",
    } <= files
    assert not any("__pycache__" in name or name == "deploy.py" for name in files)
    assert "old.py" not in files and "samples/scan.nii.gz" in files
    assert later.stdout.split()[-1] == "1" and "does not let you write" in later.stderr, later.stderr


@pytest.mark.parametrize(
    ("options", "words"), [([], "expected --model"), (["--model", "m", "--index", "i"], "belong together")]
)
def test_settings_that_do_not_go_together(site, options, words, monkeypatch, capsys):
    import app

    monkeypatch.delenv("HSENET_MODEL", raising=False)
    with pytest.raises(SystemExit):
        app.parse_arguments(options)
    assert words in capsys.readouterr().err
