"""The page at `/`, in a real browser: one chats with the model, and sees the engine's pages and queues."""

import shutil

import pytest
from serving import Gate, serving

from flex_nano_vllm import Inference

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()
SUM = "What is 17 plus 8?"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """An empty tab in which nothing may go wrong that the test has not asked for."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.wrong.append(message.text))
    yield page
    assert [text for text in page.wrong if "Failed to load resource" not in text] == []
    page.close()


@pytest.fixture(scope="module")
def engine():
    """Small pages, so that there are some to see."""
    with Inference.from_pretrained(
        "tiny-gemma2", max_batch_size=4, max_seq_length=256, page_size=16, compile=False
    ) as e:
        yield e


@pytest.fixture
def fresh(engine):
    with engine_again(engine) as again:
        yield again


def engine_again(engine):
    return Inference(engine.model, engine.tokenizer, 4, 256, page_size=16, compile=False)


def say(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def last_answer(page):
    return page.locator("#messages > .message.assistant").last


def test_a_chat_of_two_turns_is_answered_and_what_it_took_is_shown(page, fresh, tmp_path):
    with serving(fresh) as server:
        page.goto(server.url)
        page.wait_for_selector("#status[data-state=ok]")
        assert page.text_content("#model").strip() == "tiny-random"
        for question, answer in ((SUM, "25."), ("What is 8 plus 8?", "16.")):
            say(page, question)
            playwright.expect(last_answer(page).locator(".text")).to_have_text(answer)
            playwright.expect(last_answer(page).locator(".note")).to_contain_text("first token after")
        assert page.locator("#messages > .message.user").count() == 2
        playwright.expect(last_answer(page).locator(".note")).to_contain_text("cached")
        finished = page.locator("#numbers [data-stat=num_finished_requests] dd")
        playwright.expect(finished).to_have_text("2")
        assert page.locator("#pools figure[data-window=none] canvas").count() == 1
        assert page.locator("#pools figure[data-window='64'] canvas").count() == 1
        page.screenshot(path=tmp_path / "page.png")


def test_running_and_waiting_requests_are_seen_and_stopped(page, fresh):
    """Five chats in four rows: one waits. The steps stand still while one looks."""
    with serving(fresh) as server:
        gate = Gate(fresh)
        open_streams = []
        for i in range(5):
            body = dict(model="tiny-random", prompt=f"{i} times", max_tokens=200, ignore_eos=True, stream=True)
            open_streams.append(server.begin("/v1/completions", body))
        gate.wait()
        for _ in range(6):
            gate.let_pass()
            gate.wait()
        page.goto(server.url)
        gate.open()
        playwright.expect(page.locator("#running .request")).to_have_count(4)
        playwright.expect(page.locator("#waiting span")).not_to_have_count(0)
        for stream in open_streams:
            stream.close()
        playwright.expect(page.locator("#numbers [data-stat=num_running] dd")).to_have_text("0", timeout=60_000)
        playwright.expect(page.locator("#running .request")).to_have_count(0)
    assert fresh.stats().num_used_pages == 0


def test_the_key_is_asked_for_and_then_sent(page, fresh):
    with serving(fresh, api_key="open sesame") as server:
        page.goto(server.url)
        key = page.locator("#key")
        playwright.expect(key).to_be_visible()
        key.fill("open sesame")
        key.press("Enter")
        page.wait_for_selector("#status[data-state=ok]")
        say(page, SUM)
        playwright.expect(last_answer(page).locator(".text")).to_have_text("25.")


def test_an_error_is_shown_and_the_turn_can_be_sent_again(page, fresh, monkeypatch):
    with serving(fresh) as server:
        page.goto(server.url)
        page.wait_for_selector("#status[data-state=ok]")
        forward = fresh.runner.forward

        def fail(chunks):
            fresh.runner.forward = forward
            raise OSError("injected <b>")

        fresh.runner.forward = fail
        say(page, SUM)
        error = page.locator("#messages > .message.error").last
        playwright.expect(error).to_contain_text("the step has failed: OSError")
        error.locator("button.again").click()
        playwright.expect(last_answer(page).locator(".text")).to_have_text("25.")
