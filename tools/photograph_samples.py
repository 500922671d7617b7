"""Take the README's picture of a page of samples: a synthetic video, shown by tools/view_data.py in a real browser.

Example: python tools/photograph_samples.py docs/images/view-data.png

Needs chromium and chromium-driver, and the Python package selenium (extra test).
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from megatron_vila.errors import UserError, entry_point

WIDTH, HEIGHT = 1080, 810
COLORS = 160


@entry_point
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="PNG file to write")
    out = parser.parse_args().out
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        raise UserError(
            "chromium and chromedriver are not installed; on Debian: apt-get install chromium chromium-driver"
        )
    with tempfile.TemporaryDirectory() as folder:
        picture = _photograph(_page(Path(folder)))
    # Imported late: --help needs none of it.
    from PIL import Image

    # A palette is enough and makes the file small.
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(out, optimize=True)
    print(out)
    return 0


def _page(folder: Path) -> Path:
    """The page of one video with a question."""
    from megatron_vila import accelerator

    accelerator.prepare()
    from megatron_vila.data.synthetic import corpus, write_synthetic_set
    from megatron_vila.data.tokenizer import train_tokenizer
    from megatron_vila.explain.view.command import main as view

    os.chdir(folder)  # no path of this machine is in the picture
    write_synthetic_set(Path("data"), [9], train=1, evaluation=1, size=224, seed=4)
    train_tokenizer(corpus(), "data/tokenizer", 512)
    settings = [
        "data/train_9.json",
        "data.num_frames=9",
        "data.media_dir=data",
        "data.frame_separator_ids=[]",
        "--tokenizer",
        "data/tokenizer",
    ]
    if view([*settings, "--samples", "0", "--out", "page.html"]):
        raise UserError("the page could not be made")
    return folder / "page.html"


def _photograph(page: Path) -> bytes:
    """The sample with what is told of its first trained token, as PNG."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT + 400}"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # which root cannot have
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))) as driver:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(page.as_uri())
        # Room below, so that what is told of the token stands there.
        driver.execute_script(
            "document.body.style.paddingBottom = '40rem'; document.querySelector('.legend').scrollIntoView()"
        )
        trained = driver.find_element(By.CSS_SELECTOR, ".strip mark i")
        webdriver.ActionChains(driver).move_to_element_with_offset(trained, 9, 9).move_to_element(trained).perform()
        return driver.get_screenshot_as_png()


if __name__ == "__main__":
    sys.exit(main())
