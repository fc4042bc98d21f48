"""The live page against the live server, in a real headless browser."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import encode, scene_image
from live_server import rows_passed
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from explain_client import ExplainClient
from explain_client.web import LOOPBACK, Page, server_of
from tools.shapes.dataset import CLASSES, draw_scene

pytestmark = pytest.mark.slow  # Gradio takes five seconds to import and to open

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
# Remembers what the first panel has shown, with the seconds since the page was told of a file.
WATCH = """
window.shown = [];
const panel = document.querySelector("#first-panel"), started = performance.now();
new MutationObserver(() => {
  const layer = panel.querySelector(".layer")?.src ?? "", text = panel.innerText;
  const last = window.shown.at(-1);
  if (!last || last.layer !== layer || last.text !== text)
    window.shown.push({ seconds: (performance.now() - started) / 1000, layer, text });
}).observe(panel, { childList: true, subtree: true, characterData: true });
"""


@pytest.fixture(scope="module")
def address(server):
    """The page's address, served by a thread."""
    pytest.importorskip("gradio")
    listening = socket.create_server((LOOPBACK, 0))
    with ExplainClient(server.grpc_url) as client, listening:
        for _ in range(3):  # warm
            client.explain(encode(scene_image(1)), tolerance=0.05)
        page = server_of(Page(client).app())
        thread = threading.Thread(target=page.run, args=([listening],))
        thread.start()
        yield f"http://{LOOPBACK}:{listening.getsockname()[1]}/"
        page.should_exit = True
        thread.join()


@pytest.fixture
def opened(browser, address, tmp_path: Path):
    """The page with a picture of its own, explained."""
    browser.set_window_size(1300, 1200)
    browser.get(address)
    file = tmp_path / "shape.png"
    file.write_bytes(encode(scene_image(0)))
    waited(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#first-image input[type=file]"))
    browser.execute_script(WATCH)
    browser.find_element(By.CSS_SELECTOR, "#first-image input[type=file]").send_keys(str(file))
    waited(browser, lambda: is_done(browser))
    yield browser
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def waited(browser, condition: Callable[[], object]) -> object:
    return WebDriverWait(browser, 180, 0.05).until(lambda _: condition())


def panel(browser) -> str:
    return browser.find_element(By.ID, "first-panel").text


def is_done(browser) -> bool:
    return "accurate to" in panel(browser) and "sharper" not in panel(browser)


def choose(browser, label: str, value: str) -> None:
    """Choose from the first list with that label."""
    field = browser.find_element(By.CSS_SELECTOR, f"input[aria-label='{label}']")
    field.click()
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(value)
    ActionChains(browser).send_keys(Keys.ENTER).perform()


def errors(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_prediction_comes_within_a_second_and_the_colours_sharpen(opened):
    label = CLASSES[draw_scene("test", 0).label]
    shown = opened.execute_script("return window.shown")
    prediction = next(each for each in shown if f"The network says {label}" in each["text"])
    assert prediction["layer"] == ""
    assert prediction["seconds"] < 1
    layers = list(dict.fromkeys(each["layer"] for each in shown if each["layer"]))
    assert len(layers) >= 2
    assert "off by about" in next(each["text"] for each in shown if each["layer"] == layers[0])
    assert f"speaks for {label}" in panel(opened)
    assert errors(opened) == []


def test_another_polarity_takes_no_gradients(opened, server):
    before, layer = rows_passed(server), opened.find_element(By.CSS_SELECTOR, "#first-panel .layer")
    source = layer.get_attribute("src")
    choose(opened, "colours show", "evidence against")
    waited(opened, lambda: "says nothing" in panel(opened))
    assert opened.find_element(By.CSS_SELECTOR, "#first-panel .layer").get_attribute("src") != source
    assert rows_passed(server) == before


def test_a_second_class_is_contrasted(opened):
    label, other = CLASSES[draw_scene("test", 0).label], CLASSES[(draw_scene("test", 0).label + 1) % len(CLASSES)]
    choose(opened, "rather than", other)
    waited(opened, lambda: f"Why {label} rather than {other}?" in panel(opened) and is_done(opened))
    assert f"speaks for {other}" in panel(opened)


def test_the_report_of_the_pictures_opens(opened):
    opened.get(opened.find_element(By.ID, "report").get_attribute("href"))
    assert opened.find_element(By.CSS_SELECTOR, "article .layer").is_displayed()
    assert opened.find_element(By.TAG_NAME, "h2").text == "shape.png"
    assert errors(opened) == []


def test_the_page_fits_a_phone_and_is_dark_where_that_is_wanted(opened):
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    assert opened.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    answer = opened.find_element(By.CSS_SELECTOR, "#first-panel .answer")
    card = opened.find_element(By.CSS_SELECTOR, "#first-panel .panel")

    def lightness(element, of: str) -> int:
        return max(map(int, element.value_of_css_property(of).split("(")[1].rstrip(")").split(",")[:3]))

    for scheme, is_dark in (("light", False), ("dark", True)):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        waited(opened, lambda is_dark=is_dark: (lightness(card, "background-color") < 100) is is_dark)
        assert (lightness(answer, "color") > 150) is is_dark
    assert errors(opened) == []
