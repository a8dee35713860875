"""The exported student in the reader's browser: it gives Pyro's pictures there, and follows the sliders.

Runs on the site that `make docs` has built, in Debian's Chromium, without a network.
"""

import functools
import http.server
import shutil
import threading

import numpy as np
import pytest

from tests.support.package_files import ROOT

BUILT = ROOT / "build"
PIXELS = """([name, number]) => {
    const canvas = document.querySelector(`#${name} canvas:nth-of-type(${number})`);
    return Array.from(canvas.getContext("2d").getImageData(0, 0, 8, 8).data);
}"""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def address():
    """Of the built site, served on this machine."""
    if not (BUILT / "docs" / "index.html").exists():
        pytest.skip("the site is not built: make docs")
    if not (BUILT / "docs" / "_static" / "npm" / "ort.wasm.min.js").exists():
        pytest.skip("the site was built without npm")
    if not (BUILT / "docs" / "_static" / "in_browser" / "student.onnx").exists():
        pytest.skip("the site was built without the extra `export`")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=BUILT / "docs"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    """The tutorial with its models loaded, where nothing was reported as an error, and nothing came from elsewhere."""
    opened = browser.new_page()
    errors, asked = [], []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("response", lambda response: errors.append(response.url) if response.status >= 400 else None)
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(f"{address}/tutorials/ship_it.html")
    opened.wait_for_selector(".in-browser[data-state]", timeout=60_000)
    yield opened
    opened.close()
    assert not errors
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def picture(page, name, number):
    """The grey values of a canvas, shape (64,)."""
    rgba = np.array(page.evaluate(PIXELS, [name, number])).reshape(64, 4)
    assert (rgba[:, :3] == rgba[:, :1]).all()
    assert (rgba[:, 3] == 255).all()
    return rgba[:, 0]


def wait_for_change(page, name, number, before):
    script = f"([place, before]) => ({PIXELS})(place).some((level, index) => index % 4 == 0 && level != before[index / 4])"
    page.wait_for_function(script, arg=[[name, number], before.tolist()], timeout=10_000)


def test_the_page_shows_two_models_with_their_bytes_and_times(page):
    assert page.get_attribute(".in-browser", "data-state") == "ready"
    for name in ("teacher", "student"):
        caption = page.inner_text(f"#{name} figcaption")
        size = (BUILT / "docs" / "_static" / "in_browser" / f"{name}.onnx").stat().st_size
        assert caption.startswith(f"{name}: {size / 1000:.0f} kB, ")
        assert " ms an image, " in caption
        assert set(picture(page, name, 2)) <= {0, 255}  # pixels are black or white


def test_a_slider_changes_both_pictures_and_nothing_else_of_the_noise(page):
    before = {name: picture(page, name, 1) for name in ("teacher", "student")}
    noise = page.evaluate("Array.from(document.querySelector('.in-browser').noise['z/normal'].data)")
    slider = page.locator(".in-browser input").nth(2)
    slider.press("Home" if noise[2] > 0 else "End")
    for name, old in before.items():
        wait_for_change(page, name, 1, old)
    moved = page.evaluate("Array.from(document.querySelector('.in-browser').noise['z/normal'].data)")
    assert [place for place in range(8) if noise[place] != moved[place]] == [2]
    assert abs(moved[2]) == 3


def test_the_pictures_are_those_of_pyro_on_the_same_noise(page):
    noise, expected = (np.load(BUILT / "in_browser" / f"{name}.npz") for name in ("noise", "pyro"))
    give = """async ([name, values]) => {
        const place = document.querySelector('.in-browser');
        place.noise[name].data.set(values);
        await place.draw();
    }"""
    for row in range(10):
        for name in ("z/normal", "x/uniform"):
            page.evaluate(give, [name, noise[name][row].tolist()])
        for model in ("teacher", "student"):
            grey, x = (expected[f"{model}, Pyro, {site}"][row] for site in ("grey", "x"))
            assert np.abs(picture(page, model, 1) - 255 * (1 - grey)).max() <= 1
            assert (picture(page, model, 2) == 255 * (1 - x)).all()


def test_new_noise_gives_new_pictures(page):
    before = [(name, number, picture(page, name, number)) for name in ("teacher", "student") for number in (1, 2)]
    page.click(".in-browser button")
    for name, number, old in before:
        wait_for_change(page, name, number, old)
