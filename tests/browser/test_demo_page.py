"""The page in a real headless Chromium: a digit is uploaded, asked about and answered as `vlm.generate` answers. NEVA_SCREENSHOT: a file for its picture."""

import contextlib
import importlib.util
import json
import os
import shutil
import tarfile
import time

import pytest
from helpers import ROOT
from models_of_ours import ours
from test_demo import STAND_IN, TOKEN, served

import neva_jax

pytestmark = pytest.mark.browser
if importlib.util.find_spec("gradio") is None:
    pytest.skip('the page needs gradio: pip install -e ".[demo]"', allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason='the browser is driven by selenium: pip install -e ".[test]"')
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
exceptions = pytest.importorskip("selenium.common.exceptions")
if not (CHROMIUM and DRIVER):
    pytest.skip("no Chromium is here: apt-get install chromium chromium-driver", allow_module_level=True)
QUESTION = "What is written here?"


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,860"):  # root has no sandbox
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ours(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def digit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digit")
    with tarfile.open(ROOT / "examples" / "digits" / "images.tar") as tar:
        tar.extract("test/00083.png", folder, filter="data")
    return folder / "test" / "00083.png"


@pytest.fixture(scope="module")
def page(browser, model, tmp_path_factory):
    with served(tmp_path_factory.mktemp("demo"), "-m", "neva_jax.demo", f"--model={model}", "--port=0", "--dtype=float32") as (_, url):
        browser.get(url)
        yield url


def until(what, seconds: float = 120):
    """The first true value of what(), which may find elements that are just being replaced."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(exceptions.StaleElementReferenceException, exceptions.NoSuchElementException):
            if found := what():
                return found
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def texts(browser, who: str) -> list[str]:
    """Messages of the "user" or the "bot", white space evened out."""
    return [" ".join(element.get_property("textContent").split()) for element in browser.find_elements("css selector", f"#chat [data-testid={who}]")]


def ask(browser, text: str, *pictures) -> None:
    box = until(lambda: browser.find_element("css selector", "#question textarea"))
    for path in pictures:
        browser.find_element("css selector", "#question input[type=file]").send_keys(str(path))
        until(lambda: browser.find_elements("css selector", "#question img"))
    box.send_keys(text)
    while box.get_property("value"):  # the page takes no question before the last one is done with
        box.send_keys(webdriver.Keys.ENTER)
        time.sleep(0.5)


def test_a_digit_is_asked_about(browser, page, model, digit):
    """The answer is generate's, before and after a second turn; the picture is seen in the chat; nothing was asked of any other server."""
    vlm = neva_jax.from_pretrained(model, dtype="float32")
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}]
    (first,) = vlm.generate([turns], [[digit]], max_new_tokens=vlm.max_length // 2)
    turns += [{"from": "gpt", "value": first}, {"from": "human", "value": "And <b>now</b>?"}]
    (second,) = vlm.generate([turns], [[digit]], max_new_tokens=vlm.max_length // 2)
    first, second = " ".join(first.split()), " ".join(second.split())
    assert first and first != second

    ask(browser, QUESTION, digit)
    until(lambda: texts(browser, "bot") == [first])
    assert texts(browser, "user")[-1] == QUESTION
    shown = until(lambda: browser.find_element("css selector", "#chat img"))
    until(lambda: (shown.get_property("naturalWidth"), shown.get_property("naturalHeight")) == (32, 32))
    assert browser.find_element("css selector", "#about").text.split("\n")[0] == model.name
    if path := os.environ.get("NEVA_SCREENSHOT"):
        browser.save_screenshot(path)

    ask(browser, "And <b>now</b>?")
    until(lambda: texts(browser, "bot") == [first, second])
    assert texts(browser, "user")[-1] == "And <b>now</b>?"

    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {message["params"]["request"]["url"] for message in sent if message["method"] == "Network.requestWillBeSent"}
    assert any(url.startswith(page) for url in urls)
    assert [url for url in urls if not url.startswith((page, "data:", "blob:", "chrome:"))] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_what_cannot_be_asked_is_said_in_the_chat(browser, page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    browser.find_element("id", "clear").click()
    until(lambda: not texts(browser, "bot") and not texts(browser, "user"))
    ask(browser, "What is in <image>?")
    until(lambda: any("stands for a picture" in text for text in texts(browser, "bot")))
    ask(browser, QUESTION, tmp_path / "broken.png")
    until(lambda: any("broken.png: no picture" in text for text in texts(browser, "bot")))
    ask(browser, "word " * 300)
    until(lambda: any("positions" in text for text in texts(browser, "bot")))
    assert not browser.find_elements("css selector", "#chat img")


def test_stop_and_token(browser, tmp_path):
    """On a slow stand-in, behind a token, which the browser gives as a password."""
    with served(tmp_path, "-c", STAND_IN, TOKEN, 0.2) as (_, url):
        browser.get(url)
        assert "stand-in" not in browser.page_source  # but the browser's own question for a password
        browser.get(url.replace("://", f"://me:{TOKEN}@"))
        browser.get(url)
        assert "stand-in" in browser.page_source
        ask(browser, "slowly")
        until(lambda: texts(browser, "bot") and texts(browser, "bot")[0].startswith("slowly slowly"))
        browser.find_element("id", "stop").click()
        time.sleep(0.6)
        stopped = texts(browser, "bot")
        assert len(stopped[0].split()) < 24  # of 32
        ask(browser, "again")
        until(lambda: texts(browser, "bot") == [*stopped, " ".join(["again"] * 32)])
