"""The report's page, in a real headless browser (Debian's chromium and chromium-driver)."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, scene_image
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.ui import WebDriverWait

from explain_client import Explanation, Network, Prediction
from explain_client.report import Report
from explain_client.run_facts import Run

LABELS = ("star", "ring", "<b>heart</b>")
LONG = "mango_with_a_name_that_is_longer_than_any_card_is_wide_on_whatever_screen_somebody_may_have_2026.webp"
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}


def saliency(strength: float) -> np.ndarray:
    """Evidence for the class on the left, against it on the right."""
    values = np.zeros((224, 224), np.float32)
    values[60:160, 40:80], values[60:160, 150:180] = strength, -strength
    return values


def explanation(index: int) -> Explanation:
    shares = np.array([0.6 + 0.1 * index, 0.3, 0.1])
    return Explanation(
        convergence_delta=0.0,
        n_steps=(30, 10, 20)[index],
        error_estimate=(0.02, 0.08, math.nan)[index],
        milliseconds=(300.0, 100.0, 200.0)[index],
        saliency=saliency(0.5**index),
        attributions=None,
        heatmap_png=None,
        predictions=tuple(
            Prediction((index + rank) % 3, LABELS[(index + rank) % 3], share) for rank, share in enumerate(shares)
        ),
        explained_class=index,
    )


RUN = Run(
    Network("resnet18", "my weights", "c0ffee"), contrast=1, contrast_label="ring", parameters={"tolerance": 0.05}
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "folder" / "report.html"
    with Report(path, run=RUN) as report:
        images = (("in/zebra.png", (200, 200)), ("apple.jpg", (300, 200)), (LONG, (40, 60)))
        for index, (name, size) in enumerate(images):
            report.add(name, encode(scene_image(index).resize(size)), [explanation(index)], 1e3 * index + 40)
        report.add_failure("broken <i>.png", "IMAGE is not a JPEG & no PNG")
        report.add_failure("busy.png", "the server has too much to do", encode(scene_image(0)))
    return path


@pytest.fixture
def report(browser, page):
    browser.set_window_size(1300, 900)
    browser.get(page.as_uri())
    yield browser
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def shown(report) -> list[str]:
    return [
        each.find_element(By.TAG_NAME, "h2").text
        for each in report.find_elements(By.CSS_SELECTOR, "article:not([hidden])")
    ]


def card(report, number: int):
    return report.find_elements(By.TAG_NAME, "article")[number]


def text(report, selector: str, number: int = 0) -> str:
    return card(report, number).find_element(By.CSS_SELECTOR, selector).text


def test_page_loads_by_itself_and_without_errors(report, page):
    assert report.get_log("browser") == []
    content = page.read_text()
    assert "http://" not in content
    assert "https://" not in content
    assert report.execute_script("return [...document.images].every(image => image.naturalWidth > 0)")
    assert (
        report.execute_script(
            "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
        )
        == 0
    )
    assert shown(report) == ["zebra.png", "apple.jpg", LONG, "broken <i>.png", "busy.png"]
    assert "<b>heart</b>" in report.find_element(By.TAG_NAME, "main").text


def test_the_first_cards_colours_are_seen_untouched(report):
    """The left is redder, the right bluer in the coloured picture than in the photograph, within the first screen."""
    picture = card(report, 0).find_element(By.CSS_SELECTOR, ".coloured")
    assert picture.rect["y"] + picture.rect["height"] / 2 < report.execute_script("return window.innerHeight")
    other = card(report, 0).find_element(By.CSS_SELECTOR, ".picture:not(.coloured)")
    assert abs(picture.rect["y"] - other.rect["y"]) < 2  # side by side
    assert picture.rect["x"] > other.rect["x"] + other.rect["width"]
    coloured, plain = (
        np.asarray(Image.open(io.BytesIO(each.screenshot_as_png)).convert("RGB"), float) for each in (picture, other)
    )
    height, width = coloured.shape[:2]
    rows = slice(int(0.42 * height), int(0.58 * height))
    for (start, end), channel in (((0.3, 0.36), 0), ((0.7, 0.74), 2)):
        columns = slice(int(start * width), int(end * width))
        excess, own = (
            (part[rows, columns, channel] - part[rows, columns].mean(-1)).mean() for part in (coloured, plain)
        )
        assert excess - own > 30


@pytest.mark.parametrize(
    ("selector", "number", "words"),
    [
        (".answer", 0, "The network says star, 60 % sure"),
        ("figure:last-child figcaption", 0, "Why star rather than ring?"),
        (".legend", 0, "speaks for ring\nspeaks for star"),
        (".strength", 0, "the strongest colours of the 3 pictures here"),
        (".strength", 1, "colours 50 % as strong as in zebra.png, the strongest here"),
        (".strength", 2, "colours 25 % as strong as in zebra.png, the strongest here"),
        (".facts", 0, "explanation accurate to about ±2 % · 30 gradient steps · 40 ms"),
        (".facts", 1, "explanation accurate to about ±8 % · 10 gradient steps · 1.0 s"),
        (".facts", 2, "the accuracy of this explanation was not estimated · 20 gradient steps · 2.0 s"),
        (".warning", 1, "49 % of this picture lies outside the frame: the network never saw it."),
        (".failure", 3, "IMAGE is not a JPEG & no PNG"),
        (".predictions .explained", 0, "star"),
        (".predictions .contrast", 0, "ring"),
    ],
)
def test_a_card_says_what_a_stranger_needs(report, selector, number, words):
    assert text(report, selector, number) == words


def test_the_page_says_what_the_run_was_and_how_to_read_it(report):
    facts = [each.text for each in report.find_elements(By.CSS_SELECTOR, "#run div")]
    assert [fact for fact in facts if not fact.startswith("Date")] == [
        "Network\nresnet18 · my weights",
        "Checksum\nc0ffee",
        "Explained\nthe class that the network predicted rather than ring",
        "Colours\nevidence for and against",
        "Parameters\ntolerance = 0.05",
    ]
    assert "Pale colours are weak evidence" in report.find_element(By.ID, "how").text


def test_failed_images_are_small_and_have_a_thumbnail(report):
    first, *_, broken, busy = report.find_elements(By.TAG_NAME, "article")
    assert max(broken.rect["height"], busy.rect["height"]) < first.rect["height"] / 3
    assert busy.find_elements(By.TAG_NAME, "img")
    assert not broken.find_elements(By.TAG_NAME, "img")


def test_a_long_name_stays_on_one_line(report):
    title = card(report, 2).find_element(By.TAG_NAME, "h2")
    assert title.rect["height"] < 1.6 * float(title.value_of_css_property("font-size")[:-2])
    assert title.get_attribute("title") == LONG


def test_pale_colours_can_be_turned_up(report):
    layer = card(report, 2).find_element(By.CSS_SELECTOR, ".layer")
    assert layer.value_of_css_property("opacity") == "0.25"
    Select(report.find_element(By.ID, "scale")).select_by_value("alone")
    assert layer.value_of_css_property("opacity") == "1"


def test_colours_can_be_hidden(report):
    button, layer = (card(report, 0).find_element(By.CSS_SELECTOR, name) for name in (".toggle", ".layer"))
    for is_shown in (False, True):
        button.click()
        assert layer.is_displayed() is is_shown
        assert button.get_attribute("aria-pressed") == str(is_shown).lower()


def test_a_picture_is_enlarged_and_left_by_keyboard(report):
    dialog = report.find_element(By.TAG_NAME, "dialog")
    card(report, 0).find_element(By.CSS_SELECTOR, ".coloured").send_keys(Keys.ENTER)
    for key, name in (
        (Keys.NULL, "zebra.png"),
        (Keys.ARROW_RIGHT, "apple.jpg"),
        (Keys.ARROW_LEFT, "zebra.png"),
        (Keys.ARROW_LEFT, LONG),  # failures are left out
    ):
        ActionChains(report).send_keys(key).perform()
        assert dialog.find_element(By.TAG_NAME, "p").text.startswith(f"{name}: ")
    layer = dialog.find_element(By.CSS_SELECTOR, ".layer")
    assert layer.is_displayed()
    ActionChains(report).send_keys("c").perform()
    assert not layer.is_displayed()
    ActionChains(report).send_keys(Keys.ESCAPE).perform()
    assert not dialog.is_displayed()
    assert report.switch_to.active_element.get_attribute("class") == "picture coloured"


def test_a_picture_is_downloaded_with_its_caption(report, tmp_path):
    report.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    card(report, 0).find_element(By.CSS_SELECTOR, ".download").click()
    file = tmp_path / "zebra.explanation.png"
    WebDriverWait(report, 10, 0.05).until(lambda _: file.exists())
    with Image.open(file) as picture:
        assert picture.width == 480  # of a photograph of 200: the words need room
        assert picture.height > 480 + 100
        pixels = np.asarray(picture.convert("RGB"), int)
    assert (pixels[480:] < 100).any()  # words
    assert (pixels[480:, :, 2] - pixels[480:, :, 0]).max() > 100  # the bar's blue end
    assert report.get_log("browser") == []


def test_filters_filter_and_say_how_many_are_left(report):
    search = report.find_element(By.ID, "filter")
    kind = Select(report.find_element(By.ID, "kind"))
    for words, names in (("apple ring", ["apple.jpg"]), ("no png", ["broken <i>.png"])):
        search.clear()
        search.send_keys(words)
        assert shown(report) == names
        assert report.find_element(By.ID, "count").text == "1 of 5 images"
    search.clear()
    search.send_keys(" ")
    for value, names in (
        ("failed", ["broken <i>.png", "busy.png"]),
        ("inexact", ["apple.jpg"]),
        ("explained", ["zebra.png", "apple.jpg", LONG]),
    ):
        kind.select_by_value(value)
        assert shown(report) == names


def test_sorting_sorts_and_failures_come_last(report):
    order = Select(report.find_element(By.ID, "order"))
    zebra, apple, *failed = "zebra.png", "apple.jpg", "broken <i>.png", "busy.png"
    for value, names in (
        ("name", [apple, failed[0], failed[1], LONG, zebra]),
        ("steps", [apple, LONG, zebra, *failed]),
        ("error", [zebra, apple, LONG, *failed]),
        ("probability", [zebra, apple, LONG, *failed]),
        ("strength", [LONG, apple, zebra, *failed]),
        ("milliseconds", [zebra, apple, LONG, *failed]),
    ):
        order.select_by_value(value)
        assert shown(report) == names
    report.find_element(By.ID, "descending").click()
    assert shown(report) == [LONG, apple, zebra, *failed]


def test_page_fits_a_phone_and_is_dark_where_that_is_wanted(report):
    report.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    report.refresh()
    assert report.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert report.find_element(By.TAG_NAME, "header").rect["height"] <= 60
    picture = card(report, 0).find_element(By.CSS_SELECTOR, ".coloured")
    assert picture.rect["y"] + picture.rect["height"] / 2 < PHONE["height"]
    report.find_element(By.ID, "more").click()
    assert report.find_element(By.ID, "filter").is_displayed()
    lightness = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    assert min(report.execute_script(lightness)) > 200
    report.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    assert max(report.execute_script(lightness)) < 50
    assert report.get_log("browser") == []


def test_classes_of_one_image_stand_side_by_side(browser, tmp_path):
    first, second = explanation(0), replace(explanation(1), predictions=explanation(0).predictions, n_steps=11)
    with Report(tmp_path / "page.html") as report:
        report.add("both.png", encode(scene_image(0)), [first, second], 70)
        report.add("one.png", encode(scene_image(1)), [explanation(2)], 70)
    browser.set_window_size(1300, 900)
    browser.get((tmp_path / "page.html").as_uri())
    both = card(browser, 0)
    pictures = both.find_elements(By.CSS_SELECTOR, ".coloured")
    assert [each.text for each in both.find_elements(By.CSS_SELECTOR, ".pictures figcaption")] == [
        "The photograph",
        "Why star?",
        "Why ring?",
    ]
    assert len({each.size["width"] for each in pictures}) == 1
    assert text(browser, ".legend").split("\n") == ["speaks against the named class", "speaks for the named class"]
    assert text(browser, ".facts").split(" · ") == [
        "explanation accurate to about ±8 %",
        "41 gradient steps",
        "70 ms",
    ]
    assert [each.text for each in both.find_elements(By.CSS_SELECTOR, ".explained")] == ["star", "ring"]
    # Colours of one card are on one scale: those of the second class are half as strong.
    layers = [each.find_element(By.CSS_SELECTOR, ".layer").get_attribute("src") for each in pictures]
    strongest = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))))[..., 3].max() for src in layers
    ]
    assert strongest[1] < 0.75 * strongest[0]
    pictures[1].click()
    dialog = browser.find_element(By.TAG_NAME, "dialog")
    assert dialog.find_element(By.TAG_NAME, "p").text.endswith("Why ring?")
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert dialog.find_element(By.TAG_NAME, "p").text.startswith("one.png")
    ActionChains(browser).send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT).perform()
    assert dialog.find_element(By.TAG_NAME, "p").text.endswith("Why star?")
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    WebDriverWait(browser, 10).until(lambda _: browser.switch_to.active_element == pictures[0])
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(
    ("parameters", "said"), [({}, "for star"), ({"polarity": "all"}, "for star (red) or for ring")]
)
def test_a_run_of_regions_shows_the_servers_picture(tmp_path, parameters, said):
    file = encode(scene_image(0).resize((224, 224)))
    for overlay in ("regions", "masked"):
        run = replace(RUN, parameters={"overlay": overlay, **parameters})
        with Report(tmp_path / overlay, run=run) as report:
            report.add("a.png", file, [replace(explanation(0), heatmap_png=file)])
    picture = base64.b64encode(file).decode()
    page = (tmp_path / "regions").read_text()
    assert page.count(picture) == 1
    assert f"parts that hold half of the evidence {said}" in page
    assert picture not in (tmp_path / "masked").read_text()


def test_report_is_not_there_before_it_is_complete(tmp_path):
    path = tmp_path / "report.html"
    with Report(path) as report:
        report.add_failure("one", "no")
        assert not path.exists()
    assert path.read_text().rstrip().endswith("</html>")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
