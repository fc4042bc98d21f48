"""The report's page, in a real headless browser (Debian's chromium and chromium-driver)."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, scene_image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from explain_client import Explanation, Prediction
from explain_client.report import Report

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LABELS = ("star", "ring", "<b>heart</b>")


def explanation(index: int) -> Explanation:
    shares = np.array([0.6 + 0.1 * index, 0.3, 0.1])
    return Explanation(
        convergence_delta=0.0,
        n_steps=(30, 10, 20)[index],
        error_estimate=(0.02, 0.08, math.nan)[index],
        milliseconds=(300.0, 100.0, 200.0)[index],
        saliency=None,
        attributions=None,
        heatmap_png=encode(scene_image(index).convert("L").resize((224, 224))),
        predictions=tuple(
            Prediction((index + rank) % 3, LABELS[(index + rank) % 3], share) for rank, share in enumerate(shares)
        ),
        explained_class=index,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "folder" / "report.html"
    with Report(path) as report:
        for index, name in enumerate(("zebra.png", "apple.jpg", "mango.webp")):
            report.add(name, encode(scene_image(index)), explanation(index))
        report.add_failure("broken <i>.png", "IMAGE is not a JPEG & no PNG")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, Service(driver)) as running:
        yield running


@pytest.fixture
def report(browser, page):
    browser.get(page.as_uri())
    return browser


def shown(report) -> list[str]:
    return [
        each.find_element(By.TAG_NAME, "h2").text
        for each in report.find_elements(By.CSS_SELECTOR, "article:not([hidden])")
    ]


def test_page_loads_by_itself_and_without_errors(report, page):
    assert report.get_log("browser") == []
    text = page.read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert report.execute_script("return [...document.images].every(image => image.naturalWidth === 224)")
    assert (
        report.execute_script(
            "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
        )
        == 0
    )
    assert shown(report) == ["zebra.png", "apple.jpg", "mango.webp", "broken <i>.png"]
    first = report.find_element(By.TAG_NAME, "article").text
    assert "evidence for star" in first
    assert "30 steps" in first
    assert "estimated error 2.0 %" in first
    assert "60.0 %" in first
    assert "<b>heart</b>" in report.find_element(By.TAG_NAME, "main").text


def test_slider_moves_between_image_and_heatmap(report):
    article = report.find_element(By.TAG_NAME, "article")
    slider = article.find_element(By.CSS_SELECTOR, "input[type=range]")
    over = article.find_element(By.CSS_SELECTOR, ".over")
    assert "50%" in over.value_of_css_property("clip-path")
    for key, at in (("\ue010", "100%"), ("\ue011", "0")):  # End, Home
        slider.send_keys(key)
        assert at in over.value_of_css_property("clip-path")


def test_filters_filter_and_say_how_many_are_left(report):
    search = report.find_element(By.ID, "filter")
    kind = Select(report.find_element(By.ID, "kind"))
    for words, names in (("apple ring", ["apple.jpg"]), ("no png", ["broken <i>.png"])):
        search.clear()
        search.send_keys(words)
        assert shown(report) == names
        assert report.find_element(By.ID, "count").text == "1 of 4 images"
    search.clear()
    search.send_keys(" ")
    for value, names in (
        ("failed", ["broken <i>.png"]),
        ("unsure", ["apple.jpg"]),
        ("explained", ["zebra.png", "apple.jpg", "mango.webp"]),
    ):
        kind.select_by_value(value)
        assert shown(report) == names


def test_sorting_sorts_and_failures_come_last(report):
    order = Select(report.find_element(By.ID, "order"))
    for value, names in (
        ("name", ["apple.jpg", "broken <i>.png", "mango.webp", "zebra.png"]),
        ("steps", ["apple.jpg", "mango.webp", "zebra.png", "broken <i>.png"]),
        ("error", ["zebra.png", "apple.jpg", "mango.webp", "broken <i>.png"]),
        ("probability", ["zebra.png", "apple.jpg", "mango.webp", "broken <i>.png"]),
        ("milliseconds", ["apple.jpg", "mango.webp", "zebra.png", "broken <i>.png"]),
    ):
        order.select_by_value(value)
        assert shown(report) == names
    report.find_element(By.ID, "descending").click()
    assert shown(report) == ["zebra.png", "mango.webp", "apple.jpg", "broken <i>.png"]


def test_page_fits_a_phone_and_is_dark_where_that_is_wanted(report):
    report.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    assert report.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    lightness = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    assert min(report.execute_script(lightness)) > 200
    report.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    assert max(report.execute_script(lightness)) < 50
    report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    report.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_report_is_not_there_before_it_is_complete(tmp_path):
    path = tmp_path / "report.html"
    with Report(path) as report:
        report.add_failure("one", "no")
        assert not path.exists()
    assert path.read_text().rstrip().endswith("</html>")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
