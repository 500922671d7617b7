"""The page in a real browser: nothing fails, what is promised is seen, with mouse, keyboard and on a phone's width."""

import os
import shutil

import pytest

from tests.view.material import HOSTILE, MIXED, PLAIN, show

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromium-driver are not installed")


@pytest.fixture(scope="module")
def driver(shown_set, tmp_path_factory):
    """One browser for all tests of this file, with the page of the small set."""
    page = tmp_path_factory.mktemp("browser") / "page.html"
    assert show(shown_set, page, "data.packing=true", "train.global_batch_size=2", "--first", "8", "--rows", "2") == 0
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1000,900"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # which root cannot have
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as driver:
        driver.get(page.as_uri())
        yield driver


def told(driver):
    """What is told of the token that is pointed at: name and value, line by line."""
    read = "return [...document.querySelectorAll('#tip:not([hidden]) div')].map((l) => [...l.children].map((c) => c.innerText))"
    return driver.execute_script(read)


def point_at(driver, element):
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    # From beside it: a pointer that stays where it is does not point.
    webdriver.ActionChains(driver).move_to_element_with_offset(element, 9, 9).move_to_element(element).perform()


def test_all_samples_and_pictures_are_there_and_nothing_fails(driver):
    assert len(driver.find_elements(By.TAG_NAME, "article")) == 8
    pictures = driver.find_elements(By.CSS_SELECTOR, ".film img")
    assert len(pictures) == 8 + 1 + 2 * 8
    decoded = "return Promise.all([...document.querySelectorAll('.film img')].map((i) => i.decode().then(() => i.naturalWidth)))"
    assert driver.execute_script(decoded) == [56] * len(pictures)
    assert driver.get_log("browser") == []


def test_html_of_a_sample_does_not_run(driver):
    assert driver.execute_script("return window.broken") is None
    assert HOSTILE in driver.find_element(By.CSS_SELECTOR, f"#train-{MIXED} h2").text
    assert HOSTILE in driver.find_element(By.CSS_SELECTOR, f"#train-{MIXED} .strip").text


def test_a_script_that_came_in_all_the_same_would_be_refused(driver):
    add = "const s = document.createElement('script'); s.textContent = 'window.broken = 3'; document.body.append(s); s.remove()"
    driver.execute_script(add)
    assert driver.execute_script("return window.broken") is None
    assert "Content Security Policy" in driver.get_log("browser")[0]["message"]


def test_the_legend_names_every_kind_of_token(driver):
    legend = driver.find_element(By.CLASS_NAME, "legend").text
    for words in ("trained", "control token", "visual tokens", "several tokens", "padding of a row", "room left"):
        assert words in legend


def test_a_trained_token_tells_its_id_piece_place_and_label(driver):
    first, second, *_ = driver.find_elements(By.CSS_SELECTOR, f"#train-{PLAIN} mark i")
    point_at(driver, first)
    place, id_, label = first.get_attribute("data-t").split(" ")
    assert second.get_attribute("data-t").startswith(f"{int(place) + 1} {label} ")
    lines = dict(told(driver))
    assert lines["token"] == f"{id_} A"
    assert lines["place"] == place
    assert "trained" in lines["kind"] and "not trained" not in lines["kind"]
    assert lines["label"].startswith(f"{label} Ġc")


def test_a_character_of_several_tokens_tells_all_of_them(driver):
    (face,) = driver.find_elements(By.CSS_SELECTOR, f"#train-{MIXED} mark i.joint")
    assert face.text == "🙂"
    point_at(driver, face)
    assert [name for name, _ in told(driver)].count("token") == len(face.get_attribute("data-t").split(",")) > 1


def test_the_tokens_can_be_gone_through_with_the_keyboard(driver):
    strip = driver.find_element(By.CSS_SELECTOR, f"#train-{PLAIN} .strip")
    first, second, *_ = strip.find_elements(By.TAG_NAME, "i")
    strip.send_keys(Keys.HOME)
    assert "at" in first.get_attribute("class").split()
    assert dict(told(driver))["token"].endswith("<|im_start|>")
    strip.send_keys(Keys.ARROW_RIGHT)
    assert "at" in second.get_attribute("class").split()
    strip.send_keys(Keys.ESCAPE)
    assert told(driver) == []


def test_a_picture_is_enlarged_and_closed_again(driver):
    button = driver.find_element(By.CSS_SELECTOR, ".zoom")
    button.send_keys(Keys.ENTER)
    dialog = driver.find_element(By.TAG_NAME, "dialog")
    assert dialog.is_displayed() and "frame 0" in dialog.find_element(By.TAG_NAME, "p").text
    dialog.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()


def test_a_row_is_drawn_in_the_proportions_of_its_samples(driver):
    bar = driver.find_element(By.CLASS_NAME, "bar")
    parts = bar.find_elements(By.CLASS_NAME, "part")
    tokens = [float(part.value_of_css_property("flex-grow")) for part in parts]
    widths = [part.rect["width"] for part in parts]
    assert len(parts) > 1
    for width, part in zip(widths, tokens, strict=True):
        assert abs(width / sum(widths) - part / sum(tokens)) < 0.01


def test_nothing_moves_while_the_page_loads(driver):
    moved = """
        const done = arguments[0];
        new PerformanceObserver((list) => done(list.getEntries().length)).observe({ type: "layout-shift", buffered: true });
        setTimeout(() => done(0), 100);"""
    driver.refresh()
    assert driver.execute_async_script(moved) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling_in_either_scheme(driver, scheme):
    width = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", width)
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    try:
        needed = "const all = document.documentElement; return [window.innerWidth, all.scrollWidth - all.clientWidth]"
        assert driver.execute_script(needed) == [400, 0]
        back, ink = driver.execute_script(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        )
        brightness = [sum(map(int, color[4:-1].split(","))) for color in (back, ink)]
        assert brightness == sorted(brightness, reverse=scheme == "light")
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
