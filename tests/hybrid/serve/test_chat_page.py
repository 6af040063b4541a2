"""The chat page in headless Chromium: what is typed, streamed, stopped, kept and refused.

An engine that answers what it is told to stands where the real one stands; the rest is the server.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid.serve.engine import Engine
from hybrid.serve.refusals import BUSY, Refusal
from hybrid.serve.served import Served
from hybrid.session.model import HybridModel
from scripted_engine import Script
from tiny_model import TEMPLATE

pytest.importorskip("fastapi", reason="the server needs fastapi")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

FOREVER = ["word "] * 10_000
SHOWN = "## Sum\n\nUse `sum`, or **add**:\n\n```python\nsum([1, 2])\n```\n\n- one\n- two\n"
XSS = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\n\n"
    "[click](javascript:alert(1)) ![p](http://nowhere.invalid/p.png) `<b>code</b>`\n\n"
    "```html\n<script>alert(1)</script>\n```\n"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def served(model: HybridModel, script: Script) -> Iterator[Served]:
    before, model.tokenizer.chat_template = model.tokenizer.chat_template, TEMPLATE
    script.served = Served(model, "demo")
    yield script.served
    model.tokenizer.chat_template = before


@pytest.fixture
def serving(served: Served, script: Script, listening: Any) -> Callable[..., Any]:
    from hybrid.serve.app import make_app

    def serve(key: str | None = None) -> Any:
        return listening(make_app(served, script, key=key, tell=lambda line: None))

    return serve


class Chat:
    """The page, and what a person does with it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.strange: list[str] = []
        page.set_default_timeout(15_000)
        page.on("request", lambda each: self._look(each.url))
        page.on("pageerror", lambda error: self.strange.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#model:not(:empty), #settings[open]")

    def _look(self, url: str) -> None:
        if not url.startswith((self.url, "data:")):
            self.strange.append(url)

    def ask(self, text: str) -> None:
        self.page.fill("#ask", text)
        self.page.press("#ask", "Enter")

    def done(self) -> None:
        self.page.wait_for_selector("#log[aria-busy=false]")

    def shows(self, at: int, text: Any) -> None:
        """Wait until an answer is ``text``, or has what that finds."""
        answer = self.page.locator("article.assistant .body").nth(at)
        sync_api.expect(answer).to_have_text(text, timeout=15_000)

    def answers(self) -> list[str]:
        found: list[str] = self.page.locator("article.assistant .body").all_inner_texts()
        return found


@pytest.fixture
def chat(browser: Any, serving: Any) -> Iterator[Chat]:
    """The page on a desktop; at the end it has asked nobody else and had no error of its own."""
    with serving() as url:
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        made = Chat(page, url)
        yield made
        page.close()
        assert made.strange == []


def test_send_and_stream(chat: Chat, script: Script) -> None:
    """Text is shown as it comes, thoughts are folded, and the second question has the first."""
    script.pause_s = 0.05
    script.answers = [["[hm]", *["**a** "] * 30], ["two"]]
    chat.ask("one")
    chat.page.wait_for_selector("article.assistant strong")
    assert chat.page.is_visible("#stop")
    chat.done()
    assert len(chat.page.locator("article.assistant strong").all()) == 30
    assert chat.page.locator("details.thought").get_attribute("open") is None
    assert chat.page.locator("details.thought .text").text_content() == "hm"
    assert "31 tokens" in chat.page.inner_text("article.assistant .figures")
    assert "tokens/s" in chat.page.inner_text("article.assistant .figures")
    chat.page.press("#ask", "Shift+Enter")
    assert chat.page.input_value("#ask") == "\n"
    chat.ask("more")
    chat.done()
    assert script.asked == [
        "[user]one\n[assistant]",
        f"[user]one\n[assistant]{'**a** ' * 30}\n[user]more\n[assistant]",
    ]


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop(chat: Chat, script: Script, how: str) -> None:
    """The server stops too; what came stays, marked, and is sent with the next question."""
    script.pause_s = 0.02
    script.answers = [list(FOREVER), ["end"]]
    chat.ask("go")
    chat.shows(0, re.compile("(word ){5}"))
    if how == "button":
        chat.page.click("#stop")
    else:
        chat.page.keyboard.press("Escape")
    chat.done()
    assert script.left.wait(10)
    assert "stopped" in chat.page.inner_text("article.assistant .figures")
    chat.ask("on")
    chat.done()
    assert "[assistant]word word" in script.asked[1]


def test_reload_keeps_the_conversation(chat: Chat, script: Script) -> None:
    """Also one whose answer was being written; conversations are chosen and deleted."""
    script.answers = [["kept"], list(FOREVER)]
    chat.ask("first question")
    chat.done()
    chat.page.reload()
    chat.page.wait_for_selector("article.assistant")
    assert chat.answers() == ["kept"]
    chat.page.click("#new")
    script.pause_s = 0.02
    chat.ask("second question")
    chat.page.wait_for_timeout(1500)
    chat.page.reload()
    chat.page.wait_for_selector("article.assistant")
    assert chat.answers()[0].startswith("word word")
    assert "stopped" in chat.page.inner_text("article.assistant .figures")
    assert chat.page.locator("#chats .pick").all_inner_texts() == [
        "second question",
        "first question",
    ]
    chat.page.on("dialog", lambda dialog: dialog.accept())
    chat.page.click("[aria-label='Delete second question']")
    chat.page.click("text=first question")
    assert chat.answers() == ["kept"]
    assert len(chat.page.locator("#chats .pick").all()) == 1


def test_edit_and_retry(chat: Chat, script: Script) -> None:
    """What came after is forgotten."""
    script.answers = [["1"], ["2"], ["3"], ["4"]]
    chat.ask("a")
    chat.done()
    chat.ask("b")
    chat.done()
    chat.page.locator("article.assistant >> text=Retry").nth(1).click()
    chat.shows(1, "3")
    chat.page.locator("article.user >> text=Edit").nth(0).click()
    chat.page.fill("article.user form textarea", "c")
    chat.page.press("article.user form textarea", "Enter")
    chat.shows(0, "4")
    chat.done()
    assert chat.answers() == ["4"]
    assert script.asked[2] == script.asked[1]
    assert script.asked[3] == "[user]c\n[assistant]"


def test_what_is_sent_stays_text(chat: Chat, script: Script) -> None:
    """HTML in questions and answers is shown as it is; links lead to the web or nowhere."""
    script.answers = [[XSS]]
    chat.ask(XSS)
    chat.done()
    assert chat.page.title() != "owned"
    assert chat.page.locator("article img, article script, article b").count() == 0
    assert "<img src=x" in chat.page.inner_text("article.user .text")
    assert "<img src=x" in chat.answers()[0]
    links = chat.page.locator("article a").evaluate_all("all => all.map(each => each.href)")
    assert links == ["http://nowhere.invalid/p.png"]
    assert chat.page.inner_text(".code code").strip() == "<script>alert(1)</script>"


MARKDOWN = {
    "# Title #": "<h1>Title</h1>",
    "a *b* __c__ ~~d~~ `e*f*`": "<p>a <em>b</em> <strong>c</strong> <del>d</del> "
    "<code>e*f*</code></p>",
    "snake_case_name 2*3*4": "<p>snake_case_name 2*3*4</p>",
    "- a\n  - b\n- c": "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "> q\n> r": "<blockquote><p>q\nr</p></blockquote>",
    "---": "<hr>",
    "|a|b|\n|-|-|\n|1|2|": "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr>"
    "<td>1</td><td>2</td></tr></tbody></table>",
    "a\\*b": "<p>a*b</p>",
    "<b>": "<p>&lt;b&gt;</p>",
}


def test_markdown(chat: Chat) -> None:
    """Each piece becomes what it says; text that would take a slow reader long is quick."""
    render = """async (text) => {
        const { show } = await import("/page/markdown.js");
        const target = document.createElement("div");
        for (let end = 1; end <= text.length; end++) show(target, text.slice(0, end));
        return target.innerHTML;
    }"""
    for text, wanted in MARKDOWN.items():
        assert chat.page.evaluate(render, text) == wanted
    slow = """async (text) => {
        const { show } = await import("/page/markdown.js");
        show(document.createElement("div"), text);
    }"""
    for part in (
        "*",
        "**a",
        "`",
        "[",
        "[a](",
        "> ",
        "- ",
        "# ",
        "|",
        "_a",
        "~~a",
        " ",
        "![",
        "1. ",
    ):
        chat.page.evaluate(slow, part * 3000)
        chat.page.evaluate(slow, f"# {part * 3000}x")


def test_errors_in_words(chat: Chat, script: Script) -> None:
    """Refused, busy, broken off, gone: each is told where the answer would be, with a way on."""
    busy = Refusal("2 wait", status=429, kind=BUSY, code="queue_full", retry_after_s=7)
    script.answers = [busy, ["par", Refusal("it broke", status=500)], ["fine"]]
    chat.ask("a")
    chat.page.wait_for_selector("[role=alert] >> text=/busy: 2 wait.*again in 7 s/")
    chat.page.click("text=Try again")
    chat.page.wait_for_selector("[role=alert] >> text=broke off: it broke")
    assert chat.answers() == ["par"]
    chat.page.click("text=Try again")
    chat.shows(0, "fine")
    assert chat.page.locator("[role=alert]:visible").count() == 0
    chat.page.fill("#ask", "x" * 5000)
    chat.page.press("#ask", "Enter")
    chat.page.wait_for_selector("[role=alert] >> text=/refused this: messages.*tokens/")
    chat.page.context.set_offline(True)
    chat.page.click("text=Try again")
    chat.page.wait_for_selector("[role=alert] >> text=cannot be reached")


def test_a_key(browser: Any, serving: Any, script: Script) -> None:
    """Is asked for when the server wants one, and then sent; with it the settings are."""
    script.answers = [["open"]]
    with serving(key="sesame") as url:
        page = browser.new_page()
        chat = Chat(page, url)
        page.wait_for_selector("#settings-error >> text=wants its API key")
        page.fill("#key", "sesame")
        page.fill("#system", "be brief")
        page.fill("#temperature", "0.5")
        page.fill("#max_tokens", "9")
        with page.expect_request("**/chat/completions") as sent:
            page.click("#settings >> text=Done")
            chat.ask("a")
        chat.done()
        assert sent.value.post_data_json["temperature"] == 0.5
        assert sent.value.post_data_json["max_completion_tokens"] == 9
        assert script.asked == ["[system]be brief\n[user]a\n[assistant]"]
        assert chat.answers() == ["open"]
        page.close()


def test_the_strip_of_lanes(chat: Chat, script: Script) -> None:
    """What the server told of the last answer; on the CPU alone the other lanes say so."""
    script.answers = [["a"] * 11]
    chat.ask("a")
    chat.done()
    chat.page.wait_for_selector("#rates >> text=40 tokens in, 11 out")
    assert "50.0 tokens/s" in chat.page.inner_text("#rates")
    assert "40 tokens in, 11 out" in chat.page.inner_text("#rates")
    assert "20.0 ms" in chat.page.locator("#lanes dd").nth(0).inner_text()
    assert chat.page.locator("#lanes dd").nth(1).inner_text() == "not in use: the CPU runs all"


def test_phone_width(browser: Any, serving: Any, script: Script) -> None:
    """Nothing is wider than the screen, and conversations come from the side."""
    script.answers = [["a" * 300 + "\n\n```\n" + "b" * 300 + "\n```\n\n|a|b|\n|-|-|\n|1|2|"]]
    with serving() as url:
        page = browser.new_page(viewport={"width": 360, "height": 640})
        chat = Chat(page, url)
        chat.ask("q" * 200)
        chat.done()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("document.getElementById('log').scrollWidth") <= 360
        assert not page.is_visible("#new")
        page.click("#menu")
        assert page.is_visible("#new")
        page.keyboard.press("Escape")
        assert not page.is_visible("#new")
        page.close()


def test_with_the_model(
    browser: Any, served: Served, model: HybridModel, engine: Engine, listening: Any
) -> None:
    """The real engine's answer is on the page, and what its tokens took is in the strip."""
    from hybrid.serve.app import make_app

    asked = [{"role": "user", "content": "import os"}]
    wanted = model.chat(asked, do_sample=False, max_new_tokens=12)
    with listening(make_app(served, engine, tell=lambda line: None)) as url:
        page = browser.new_page()
        chat = Chat(page, url)
        page.click("#open-settings")
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "12")
        page.click("#settings >> text=Done")
        chat.ask("import os")
        chat.done()
        assert page.evaluate(
            "Object.entries(localStorage).filter(([name]) => name.startsWith('hybrid.chat.'))"
            ".map(([, chat]) => JSON.parse(chat).messages[1].content)"
        ) == [wanted]
        page.wait_for_selector("#rates >> text=12 out")
        assert " ms" in page.locator("#lanes dd").nth(0).inner_text()
        page.close()


LANES = {
    "model": "demo",
    "device": "cuda",
    "thinking": ["enable_thinking"],
    "last": {
        "prompt_tokens": 40,
        "new_tokens": 9,
        "ttft_s": 0.5,
        "tokens_per_s": 42.0,
        "ended": "end token",
    },
    "token": {"predicted_s": 0.024, "measured_s": 0.0238},
    "lanes": {
        "cpu": {"predicted_s": 0.010, "measured_s": 0.0105},
        "gpu": {"predicted_s": 0.008, "measured_s": 0.0074},
        "link": {"predicted_s": 0.012, "measured_s": 0.0125},
    },
    "hit_rate": 0.873,
    "note": None,
}


def test_the_lanes_of_a_device(chat: Chat, script: Script) -> None:
    """Each has its bar and, within it, what was predicted; and there is a hit rate."""
    chat.page.route(re.compile(r"/lanes(\?|$)"), lambda route: route.fulfill(json=LANES))
    script.answers = [["a"] * 9]
    chat.ask("a")
    chat.done()
    chat.page.wait_for_selector("#rates >> text=hit rate 87 %")
    assert "a token 23.8 ms, predicted 24.0 ms" in chat.page.inner_text("#rates")
    assert chat.page.locator("#lanes dd").all_inner_texts() == [
        "10.5 ms, predicted 10.0 ms",
        "7.40 ms, predicted 8.00 ms",
        "12.5 ms, predicted 12.0 ms",
    ]
    width, mark = chat.page.evaluate("""() => {
        const [track] = [...document.querySelectorAll("#lanes .track")].slice(1);
        return [track.children[0].style.width, track.children[1].style.left].map(parseFloat);
    }""")
    assert width == pytest.approx(95 * 0.0074 / 0.0125, abs=0.1)
    assert mark == pytest.approx(95 * 0.008 / 0.0125, abs=0.1)
    chat.page.click("#open-settings")
    chat.page.select_option("#thinking", "off")
    script.answers = [["b"]]
    chat.page.click("#settings >> text=Done")
    with chat.page.expect_request("**/chat/completions") as sent:
        chat.ask("b")
    assert sent.value.post_data_json["chat_template_kwargs"] == {"enable_thinking": False}
    chat.done()


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 375), ("dark", 375)]
)
def test_how_it_looks(
    browser: Any, serving: Any, script: Script, scheme: str, width: int, tmp_path: Path
) -> None:
    """Both colour schemes and a phone; the picture is in the test's folder, to be looked at."""
    with serving() as url:
        page = browser.new_page(viewport={"width": width, "height": 760}, color_scheme=scheme)
        page.route(re.compile(r"/lanes(\?|$)"), lambda route: route.fulfill(json=LANES))
        chat = Chat(page, url)
        script.answers = [["[We add.]", SHOWN], [Refusal("it broke", status=500)]]
        chat.ask("How do I add numbers?")
        chat.done()
        chat.ask("And subtract them?")
        page.wait_for_selector("[role=alert]")
        ink, back = page.evaluate("""() => {
            const style = getComputedStyle(document.body);
            return [style.color, style.backgroundColor].map((each) => parseInt(each.slice(4)));
        }""")
        assert (ink < 60 < 200 < back) if scheme == "light" else (back < 60 < 200 < ink)
        page.screenshot(path=tmp_path / "page.png")
        page.click("#open-settings")
        page.screenshot(path=tmp_path / "settings.png")
        page.close()
