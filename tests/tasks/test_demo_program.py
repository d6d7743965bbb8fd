"""The page as its users see it: the program, and a browser that loads the page, uploads, slides and clicks."""

import io
import json
import os
import shutil
import signal
import threading
import urllib.request
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from configs import demo
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.signals import Stopped
from mae_jax.tasks.demo import program
from tests import runs
from tests.runs import mistake, run_task

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def picture_file():
    """A PNG of a bright cross, larger than the model's images."""
    array = np.zeros((32, 32), np.uint8)
    array[12:20], array[:, 12:20] = 255, 255
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
def test_in_a_browser_uploads_masks_and_attention_work_no_request_leaves_and_sigterm_ends_it_with_143(
    pretrained, tmp_path
):
    from playwright.sync_api import sync_playwright

    arguments = f"--config.init_from={pretrained}", "--config.demo.port=0", f"--workdir={tmp_path / 'demo'}"
    process = runs.start("--config=configs/demo.py", *arguments)
    try:
        line = process.stdout.readline()
        address = line.removeprefix("the page is at ").removesuffix(" until Ctrl-C\n")
        assert urlsplit(address).hostname == "127.0.0.1", line
        with sync_playwright() as playwright:
            # Chromium's sandbox does not start as root.
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page, asked, faults = browser.new_page(viewport={"width": 1100, "height": 900}), [], []
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: faults.append(message.text))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto(address)
            use_the_page(page)
            browser.close()
        assert {urlsplit(url).netloc for url in asked if not url.startswith("data:")} == {urlsplit(address).netloc}
        assert len([url for url in asked if url.endswith("/api/reconstruct")]) >= 5
        assert len(faults) == 1 and "400" in faults[0]  # the damaged upload
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.communicate()


def use_the_page(page):
    page.wait_for_selector("#attention:not([hidden])")
    page.wait_for_selector("#prediction[src]")
    assert page.locator("#pictures button").count() == 16
    assert page.inner_text("#hidden") == "75 %: 12 of 16 patches"

    first = Contents(page)
    page.set_input_files("#file", {"name": "cross.png", "mimeType": "image/png", "buffer": picture_file()})
    first.wait_for_change("picture", "prediction", "pasted", "mean")
    assert page.inner_text("#chosen") == "cross.png"

    uploaded = Contents(page)
    page.locator("#ratio").fill("4")
    uploaded.wait_for_change("masked", "prediction", "pasted")
    assert page.inner_text("#hidden") == "25 %: 4 of 16 patches"

    slid = Contents(page)
    page.locator("#masked").click(position={"x": 5, "y": 5})
    slid.wait_for_change("masked", "prediction", "pasted")
    assert page.inner_text("#hidden") in ("19 %: 3 of 16 patches", "31 %: 5 of 16 patches")

    clicked = Contents(page)
    page.locator("#picture").click(position={"x": 5, "y": 5})
    clicked.wait_for_change("picture", "mean")
    assert "row 1, column 1" in page.inner_text("#whose") and page.locator("#heads canvas").count() == 2

    page.locator("#ofclass").click()
    page.wait_for_function("document.getElementById('whose').textContent.startsWith('The class token')")
    damaged = {"name": "damaged.png", "mimeType": "image/png", "buffer": picture_file()[:50]}
    page.set_input_files("#file", damaged)
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error").startswith("the file cannot be used: ")
    page.locator("#pictures button").nth(2).click()
    page.wait_for_selector("#error", state="hidden")


class Contents:
    """What the canvases and pictures of the page show at one time."""

    READ = "id => { const e = document.getElementById(id); return e.src || e.toDataURL(); }"

    def __init__(self, page):
        ids = ("picture", "masked", "prediction", "pasted", "mean")
        self._page, self._before = page, {name: page.evaluate(self.READ, name) for name in ids}

    def wait_for_change(self, *names):
        changed = f"([id, before]) => ({self.READ})(id) !== before"
        for name in names:
            self._page.wait_for_function(changed, arg=[name, self._before[name]])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_is_the_usual_end_and_sigterm_a_stop(number, pretrained, tmp_path, monkeypatch):
    seen = []

    def visit(line):
        with urllib.request.urlopen(f"{line.split()[4]}/api/about") as answer:
            seen.append(json.load(answer))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(program, "say", lambda line: threading.Thread(target=visit, args=[line]).start())
    settings = dict(init_from=str(pretrained), demo__port=0, evaluate__pictures=2, evaluate__mask_ratio=0.5)
    if number == signal.SIGINT:
        run_task("demo", tmp_path / "run", **settings)
    else:
        with pytest.raises(Stopped):
            run_task("demo", tmp_path / "run", **settings)
    assert seen[0]["mask_ratio"] == 0.5 and len(seen[0]["pictures"]) == 2


def open_with(**settings):
    config = demo.get_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in settings.items()})
    return config


def test_pictures_are_those_of_a_file_or_folder_or_the_checkpoints_own_or_none_but_what_is_uploaded(
    pretrained, tmp_path, monkeypatch, capsys
):
    (tmp_path / "a.png").write_bytes(picture_file())
    (tmp_path / "b.png").write_bytes(picture_file())
    for path, count in ((tmp_path, 2), (tmp_path / "a.png", 1)):
        config = open_with(init_from=str(pretrained), data__path=str(path))
        assert len(program.open_model(config, tmp_path / "run")[2]["eval"]) == count
    config = open_with(init_from=str(pretrained))
    assert program.open_model(config, tmp_path / "run")[2].keys() == {"eval"}
    config.demo.index = str(tmp_path)  # whose pictures may be of either split
    assert program.open_model(config, tmp_path / "run")[2].keys() == {"eval", "train"}

    def missing(*_, **__):
        raise UserError("the pictures are not there")

    monkeypatch.setattr(program, "find_sources", missing)
    assert program.open_model(open_with(init_from=str(pretrained)), tmp_path / "run")[2] == {}
    assert "note: no pictures to choose from, only to upload (the pictures are not there)" in capsys.readouterr().out
    assert "the pictures are not there" in mistake(
        "demo", tmp_path / "run", init_from=str(pretrained), data__name="digits"
    )


def test_what_a_user_gets_wrong_is_told_before_anything_compiles(pretrained, tmp_path):
    init_from = str(pretrained)
    assert "demo.port=70000 is outside" in mistake("demo", tmp_path / "run", init_from=init_from, demo__port=70000)
    assert "init_from is not set" in mistake("demo", tmp_path / "run")
    assert "demo.index=" in mistake("demo", tmp_path / "run", init_from=init_from, demo__index=str(tmp_path))
    text = mistake("demo", tmp_path / "run", init_from=init_from, evaluate__mask_ratio=0.99)
    assert "evaluate.mask_ratio=0.99" in text
