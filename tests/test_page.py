"""The web page at `/` in a real browser: a chat with the model, and a view of the engine's pages and queues."""

import json
import re
import shlex
import shutil

import pytest
from serving import Calls, Gate, Served, serving

from flex_nano_vllm import Inference

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()
playwright.expect.set_options(timeout=30_000)  # the first step takes seconds on a busy machine
SUM = "What is 17 plus 8?"
MONTHS = "The 12 months of the year are: January, February, March,"
VIEWPORT = dict(width=1280, height=900)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A new tab. The test fails if the web page raises or logs an error, except for resources that fail to load."""
    page = browser.new_page(viewport=VIEWPORT)
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.wrong.append(message.text))
    yield page
    assert [text for text in page.wrong if "Failed to load resource" not in text] == []
    page.close()


@pytest.fixture(scope="module")
def engine():
    """An engine with small pages, so that requests use several pages."""
    with Inference.from_pretrained(
        "tiny-gemma2", max_batch_size=4, max_seq_length=256, page_size=16, compile=False
    ) as e:
        yield e


@pytest.fixture
def fresh(engine):
    with engine_again(engine) as again:
        yield again


def engine_again(engine, **sizes):
    sizes = dict(max_batch_size=4, max_seq_length=256, page_size=16) | sizes
    return Inference(engine.model, engine.tokenizer, compile=False, **sizes)


def say(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def last_answer(page):
    return page.locator("#messages > .message.assistant").last


class Load:
    """Requests of other clients before the request of the web page, and a gate that holds the steps.

    Each step passes when the web page needs the state after it.

    Args:
        nums_requests: the number of completion requests that each of the other clients sends.
    """

    def __init__(self, page, server: Served, monkeypatch, *nums_requests: int):
        self.page, self.server = page, server
        self.gate = Gate(server.engine)
        self.polls, self.aborts = (Calls(monkeypatch, server.shared, name) for name in ("call", "abort"))
        self.streams = []
        body = dict(model="tiny-random", max_tokens=200, ignore_eos=True, stream=True)
        for number in nums_requests:
            prompts = [f"{i} times" for i in range(number)]
            stream = server.begin("/v1/completions", body | dict(prompt=prompts))
            self.streams.append((number, stream, stream.getresponse()))  # once it returns, the requests are queued
        self.gate.wait()
        page.goto(server.url)

    def remove_first(self) -> None:
        number, *stream = self.streams.pop(0)
        for end in reversed(stream):
            end.close()
        for _ in range(number):
            self.aborts.wait()

    def ask(self, question: str) -> None:
        with self.page.expect_response("**/v1/chat/completions"):  # once it arrives, the request is queued
            say(self.page, question)
        for _ in range(2):  # the first poll may precede the question
            self.next_state()

    def next_state(self) -> None:
        self.polls.wait()
        with self.page.expect_response("**/state"):
            self.gate.let_pass()
            self.gate.wait()

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *exception: object) -> None:
        while self.streams:
            self.remove_first()
        self.gate.open()


def num_ring_pixels(page) -> list[int]:
    """Return, for each pool, the number of pixels in the text colour, which only the ring around own pages has."""
    return page.evaluate(
        """() => [...document.querySelectorAll("#pools canvas")].map((canvas) => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            const colour = getComputedStyle(document.body).color.match(/\\d+/g).map(Number);
            let count = 0;
            for (let i = 0; i < data.length; i += 4) count += colour.every((value, j) => data[i + j] === value);
            return count;
        })"""
    )


def test_a_chat_of_two_turns_is_answered_and_its_statistics_are_shown(page, fresh, tmp_path):
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


def test_running_and_waiting_requests_are_shown_until_they_are_aborted(page, fresh):
    """Five requests and four rows: one request waits. The gate holds the steps until the web page has loaded."""
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


def test_the_web_page_requests_the_api_key_and_sends_it(page, fresh):
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


def test_the_error_for_a_missing_or_wrong_key_explains_where_to_enter_it(page, fresh):
    with serving(fresh, api_key="open sesame") as server:
        page.goto(server.url)
        say(page, SUM)
        error = page.locator("#messages > .message.error")
        playwright.expect(error.locator(".text")).to_have_text("This server requires an API key: enter it above")
        page.fill("#key", "open barley")
        page.press("#key", "Enter")
        error.locator("button.again").click()
        playwright.expect(error.locator(".text")).to_have_text("This server requires another API key: enter it above")
        page.fill("#key", "open sesame")
        page.press("#key", "Enter")
        error.locator("button.again").click()
        playwright.expect(last_answer(page).locator(".text")).to_have_text("25.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_users_request_is_marked_while_it_waits_and_while_it_runs(page, fresh, scheme, monkeypatch):
    page.emulate_media(color_scheme=scheme)
    with serving(fresh) as server:
        with Load(page, server, monkeypatch, 3, 2) as load:  # five requests, four rows
            load.ask(MONTHS)
            playwright.expect(page.locator("#waiting .mine b")).to_have_text("yours")
            assert page.locator("#running .mine").count() == 0
            assert num_ring_pixels(page) == [0, 0]

            load.remove_first()
            for _ in range(2):
                load.next_state()
            playwright.expect(page.locator("#running .request").first).to_have_class("request mine")
            playwright.expect(page.locator("#running .mine b")).to_have_text("yours")
            assert page.locator("#running .mine").count() == 1
            assert page.locator("#waiting .mine").count() == 0
            assert min(num_ring_pixels(page)) > 20
            assert "yours" in page.text_content("#pools figure[data-window=none] small")
        playwright.expect(last_answer(page).locator(".text")).to_contain_text("December")
        playwright.expect(page.locator("#status")).to_have_text("idle")
        assert page.locator(".mine").count() == 0
        assert num_ring_pixels(page) == [0, 0]


def test_the_progress_of_waiting_and_prefill_is_shown_until_text_arrives(page, engine, monkeypatch):
    with (
        engine_again(engine, max_batch_size=1, max_num_batched_tokens=8) as slow,  # computes the prompt in three steps
        serving(slow) as server,
        Load(page, server, monkeypatch, 1, 1) as load,
    ):
        load.ask(SUM)
        progress = last_answer(page).locator(".progress")
        playwright.expect(progress).to_have_text("waiting, 1 request ahead")
        for _ in range(2):
            load.remove_first()
        for _ in range(2):
            load.next_state()
        playwright.expect(progress).to_have_text("reading the prompt, 8 of 18 tokens")
        for _ in range(2):
            load.next_state()
        playwright.expect(last_answer(page).locator(".text")).to_have_text(re.compile("^2"))
        playwright.expect(progress).to_have_count(0)


def test_the_first_eight_waiting_requests_and_the_users_request_are_shown(page, fresh, monkeypatch):
    with serving(fresh) as server, Load(page, server, monkeypatch, 4, 20) as load:
        load.ask(SUM)
        playwright.expect(page.locator("#waiting span")).to_have_count(9)
        playwright.expect(page.locator("#waiting .mine")).to_contain_text("20 ahead")
        playwright.expect(page.locator("#waiting")).to_contain_text("and 12 more")


def test_a_request_behind_the_64_listed_requests_shows_64_or_more_requests_ahead(page, fresh, monkeypatch):
    with serving(fresh) as server, Load(page, server, monkeypatch, 4, 35, 35) as load:
        load.ask(SUM)
        progress = last_answer(page).locator(".progress")
        playwright.expect(progress).to_have_text("waiting, 64 or more requests ahead")
        page.click("#stop")
        playwright.expect(page.locator("#messages > .message.error")).to_contain_text("Stopped before")
        playwright.expect(progress).to_have_count(0)


def test_an_example_is_sent_on_click_and_the_examples_return_with_a_new_chat(page, fresh):
    answers = {SUM: "25.", "Reverse these words: lamp key drum boat.": "boat drum key lamp.", MONTHS: "April"}
    with serving(fresh) as server:
        page.goto(server.url)
        examples = page.locator("button.example")
        for example, answer in zip(examples.all(), answers.values(), strict=True):
            example.click()
            playwright.expect(last_answer(page).locator(".text")).to_contain_text(answer)
            playwright.expect(last_answer(page).locator(".note")).to_be_visible()
            assert not any(button.is_visible() for button in examples.all())
            page.click("#new")
            playwright.expect(example).to_be_visible()
        assert examples.all_text_contents() == list(answers)


def test_the_main_information_is_visible_without_scrolling_under_load(page, engine, monkeypatch):
    """The engine has its default sizes."""
    with (
        engine_again(engine, max_batch_size=32, max_seq_length=None, page_size=None) as large,
        serving(large) as server,
        Load(page, server, monkeypatch, 60) as load,
    ):
        load.ask(SUM)
        playwright.expect(page.locator("#waiting .mine")).to_be_visible()
        numbers = page.locator("#numbers [data-stat]:visible")
        names = [number.get_attribute("data-stat") for number in numbers.all()]
        assert names == ["num_running", "num_waiting", "rate", "kv_usage"]
        rows = page.locator("#running .request")
        waiting, running = (page.get_by_role("heading", name=name) for name in ("Waiting", "Running"))
        pools = page.locator("#pools canvas").all()
        lists = [waiting, page.locator("#waiting"), running, rows.nth(0), rows.nth(1), rows.nth(2)]
        boxes = [element.bounding_box() for element in (*numbers.all(), page.locator("#speed"), *pools, *lists)]
        assert len(pools) == 2 and all(box["width"] > 0 for box in boxes)
        assert max(box["y"] + box["height"] for box in boxes) <= VIEWPORT["height"]
        tops = [element.bounding_box()["y"] for element in lists]
        assert tops == sorted(tops), "Waiting must be above Running, and the rows must be in order"


def test_the_peak_speed_is_shown_only_after_tokens_were_generated(page, fresh):
    with serving(fresh) as server:
        page.goto(server.url)
        playwright.expect(page.locator("#numbers [data-stat=rate] dd")).to_have_text("0")
        playwright.expect(page.locator("#engine")).to_contain_text("last 30 s")
        assert page.get_by_text("peak").count() == 0
        say(page, SUM)
        playwright.expect(page.locator("#peak")).to_have_text(re.compile(r"^peak \d+$"))


def test_the_curl_command_requests_an_answer_of_this_server(page, fresh):
    with serving(fresh) as server:
        page.goto(server.url)
        page.wait_for_selector("#status[data-state=ok]")
        page.click("#curl summary")
        page.get_by_role("link", name="/openapi.json").wait_for()
        command, url, *options = shlex.split(page.inner_text("#command").replace("\\\n", ""))
        assert command == "curl" and url.startswith(server.url) and options[::2] == ["-H", "-d"]
        status, _, body = server.ask("POST", url.removeprefix(server.url), options[-1])
        assert status == 200
        assert json.loads(body)["choices"][0]["message"]["content"] == "25."
