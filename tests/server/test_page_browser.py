"""The page in a real browser: on a phone with a real model; and what answers may hold."""

import shutil

import pytest
from helpers.generation import picture
from helpers.page_site import png, served
from helpers.server_process import KEY, bomb, metrics

sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")]


def test_the_page_answers_about_an_uploaded_image_and_shows_errors(server, folder):
    before = metrics(server)["fusion_answer_tokens_total"]
    (folder / "good.png").write_bytes(picture(1))
    (folder / "large.png").write_bytes(bomb())
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = chromium.new_page(**play.devices["Pixel 5"])
        page.set_default_timeout(60_000)
        page.goto(server[0])
        page.locator("input[type=password]").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("That is not the key.").wait_for()
        page.locator("input[type=password]").fill(KEY)
        page.keyboard.press("Enter")
        page.locator("#image input[type=file]").set_input_files(folder / "good.png")
        page.locator("#image img").first.wait_for()
        page.locator("#question textarea").fill("Which colour is it?")
        page.keyboard.press("Enter")
        page.locator("#chat .bot").first.wait_for()
        page.wait_for_function("() => !['', '…'].includes(document.querySelector('#chat .bot').innerText.trim())")
        assert "Which colour is it?" in page.locator("#chat").inner_text()
        assert metrics(server)["fusion_answer_tokens_total"] > before
        width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1]  # nothing to scroll sideways on a phone

        drawn = "word => document.querySelector('#picture img')?.alt === `Where the model looks for ${word}`"
        page.locator("#words").get_by_text("colour").click()
        page.wait_for_function(drawn, arg="colour")
        page.wait_for_function("() => document.querySelector('#picture img').naturalWidth > 600")
        page.wait_for_function("() => document.querySelector('#word input').value === 'colour'")
        shown, word = page.locator("#picture img"), page.locator("#word input")
        first = shown.get_attribute("src")
        word.fill("Which")
        page.keyboard.press("Enter")
        page.wait_for_function(drawn, arg="Which")
        assert shown.get_attribute("src") != first
        word.fill("dog")
        page.locator("#show").click()
        page.get_by_text("'dog' is not in the question").first.wait_for()
        assert shown.is_visible() and page.locator("#picture .error").is_hidden()  # the last picture stays
        page.locator("#words").get_by_text("colour").click()  # once more, after a typed word
        page.wait_for_function(drawn, arg="colour")
        assert metrics(server)["fusion_recompilations"] == 0

        page.get_by_role("button", name="New conversation").click()
        shown.wait_for(state="detached")
        page.locator("#show").click()
        page.get_by_text("Upload an image first.").first.wait_for()
        page.locator("#image input[type=file]").set_input_files(folder / "large.png")
        page.locator("#image img").first.wait_for()
        page.locator("#question textarea").fill("Which colour is it?")
        page.keyboard.press("Enter")
        page.get_by_text("10000x5000 pixels").first.wait_for()
        chromium.close()


def test_an_answer_is_text_and_calls_nowhere(tmp_path):
    answer = "<img src=x onerror='window.hit=1'>\n![a](http://127.0.0.9/) [b](javascript:window.hit=1)\n"
    answer += "**bold** $$x$$ 1 < 2 & &lt; <"
    (tmp_path / "good.png").write_bytes(png())
    with served() as (address, engine), sync_api.sync_playwright() as play:
        engine.text = answer
        chromium = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = chromium.new_page()
        page.set_default_timeout(60_000)
        urls, problems = [], []
        page.on("request", lambda request: urls.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda console_message: (
                problems.append(console_message.text) if "Security Policy" in console_message.text else None
            ),
        )
        page.goto(address)
        page.locator("#image input[type=file]").set_input_files(tmp_path / "good.png")
        page.locator("#image img").first.wait_for()
        page.locator("#question textarea").fill("<b>Which</b> colour is it?")
        page.keyboard.press("Enter")
        page.get_by_text("**bold**").wait_for()
        text = page.locator("#chat").inner_text()
        assert answer in text and "<b>Which</b> colour is it?" in text
        assert not page.locator("#chat .message :is(a, img)").count() and page.evaluate("window.hit") is None
        assert all(url.startswith((address, "data:", "blob:")) for url in urls) and not problems

        page.get_by_role("button", name="Clear").click()  # of the conversation alone
        page.locator("#chat .bot").wait_for(state="detached")
        page.locator("#question textarea").fill("Anew?")
        page.keyboard.press("Enter")
        page.get_by_text("**bold**").wait_for()
        assert len(engine.records[-1].turns) == 1 and engine.records[-1].images
        chromium.close()
