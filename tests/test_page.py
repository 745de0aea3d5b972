"""fast_inference.py: as Streamlit's own test driver sees it, and (slow) as a person in a browser does."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import streamlit as st
import torch
from stages import REPO, stage
from streamlit.testing.v1 import AppTest

from model.chat import ChatModel, Progress
from model.checkpoint import file_sha256, save_weights
from model.LMConfig import LMConfig
from model.lora import LoRAConfig, adapter_state, add_adapter
from model.model import Transformer
from model.tokenizer import load_tokenizer

PAGE = REPO / "fast_inference.py"
SETTINGS = {"seed": 3, "temperature": 0.5, "top_k": 14, "max_new_tokens": 512}  # the page's, with this seed


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory) -> Path:
    """full_sft_64.pth, rl_64.pth with other weights, an adapter for the first, and what is no model to chat with."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer = load_tokenizer()
    config = LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, max_seq_len=96)
    meta = {"config": config.to_dict(), "tokenizer": tokenizer.fingerprint, "args": {}}
    for seed, name in enumerate(("full_sft", "rl")):
        torch.manual_seed(seed)
        model = Transformer(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
        save_weights(folder / f"{name}_64.pth", model.state_dict(), meta | {"stage": name})
    lora, base = LoRAConfig(rank=2), folder / "full_sft_64.pth"
    add_adapter(model, lora)
    state = {name: torch.randn_like(value) for name, value in adapter_state(model).items()}
    about = {"lora": lora.to_dict(), "base": {"file": base.name, "sha256": file_sha256(base)}}
    save_weights(folder / "lora_deer_64.pth", state, meta | {"stage": "lora_deer"} | about)
    for name in ("full_sft_64_resume.pth", "lora_other_512.pth"):
        (folder / name).write_bytes(b"")
    return folder


@pytest.fixture
def page(out_dir, monkeypatch):
    """page(*arguments): the page opened anew, with a fixed seed."""

    def open_page(*arguments: str) -> AppTest:
        monkeypatch.setattr(sys, "argv", [str(PAGE), *(arguments or ("--out_dir", str(out_dir)))])
        app = AppTest.from_file(str(PAGE), default_timeout=60).run()
        assert not app.exception
        if len(app.number_input):
            app.number_input(key="seed").set_value(3).run()
        return app

    return open_page


def send(app: AppTest, question: str) -> AppTest:
    return calm(app.chat_input[0].set_value(question).run())


def click(app: AppTest, key: str) -> AppTest:
    return calm(app.button(key=key).click().run())


def calm(app: AppTest) -> AppTest:
    assert not app.exception, app.exception
    return app


def texts(app: AppTest) -> list[str]:
    """Questions and answers as they are kept, and as they are shown: without spaces around them."""
    turns = app.session_state.chat["turns"]
    kept = [text for turn in turns for text in (turn["question"], *(reply["text"] for reply in turn["answers"]))]
    assert [text.value for text in app.text] == [textwrap.dedent(text).strip() for text in kept]
    return kept


def captions(app: AppTest) -> str:
    return "\n".join(caption.value for caption in app.main.caption).replace("\\", "")


def upload(app: AppTest, data: bytes) -> None:
    calm(app.file_uploader(key="upload").set_value(("x.jsonl", data, "application/jsonl")).run())


def replies(out_dir: Path, name: str, *questions: str, system: str = "", lora=()) -> list[str]:
    """What the page should show to each question by itself."""
    model = ChatModel.from_pretrained(out_dir / name, lora=[out_dir / file for file in lora])
    return [model.chat(question, None, system, **SETTINGS)[0] for question in questions]


def test_questions_are_sent_as_typed_and_shown_as_text(page, out_dir):
    app = page()
    questions = ["你好", "<script>alert(1)</script> **粗** </s>"]
    app.text_area(key="system").set_value("系统")
    for question in questions:
        send(app, question)
    plain = replies(out_dir, "full_sft_64.pth", *questions, system="系统")
    assert texts(app) == [questions[0], plain[0], questions[1], plain[1]] and plain[0] != plain[1]
    assert "full_sft_64 · " in captions(app) and " 词元/秒" in captions(app) and "达到最大长度" in captions(app)
    assert not any("alert" in element.value for element in [*app.markdown, *app.main.caption])
    assert [code.value for code in app.code] == plain, "to copy"

    app.slider(key="history").set_value(2)
    click(app, "again")
    assert texts(app)[3] == plain[1] and "略去了最早的 1 轮" in captions(app), "the first answer filled the context"


def test_the_history_goes_along_as_far_as_asked(page, out_dir):
    app, model = page(), ChatModel.from_pretrained(out_dir / "full_sft_64.pth")
    upload(app, json.dumps({"q": "二", "a": "2", "history": [["一", "1"]]}).encode())
    send(app, "三")
    for messages, history in ((0, []), (2, [("二", "2")]), (4, [("一", "1"), ("二", "2")])):
        app.slider(key="history").set_value(messages)
        click(app, "again")
        assert texts(app) == ["一", "1", "二", "2", "三", model.chat("三", history, **SETTINGS)[0]]


def test_edit_replaces_the_last_question(page, out_dir):
    app = send(page(), "错字")
    click(app, "edit")
    assert app.text_area(key="edited").value == "错字"
    app.text_area(key="edited").set_value("改好")
    calm(next(button for button in app.button if button.label == "发送").click().run())
    assert texts(app) == ["改好", *replies(out_dir, "full_sft_64.pth", "改好")]
    click(app, "edit")
    calm(next(button for button in app.button if button.label == "取消").click().run())
    assert texts(app)[0] == "改好"
    assert texts(click(app, "clear")) == []


def test_two_models_an_adapter_and_the_languages(page, out_dir):
    app = page()
    assert app.selectbox(key="model").options == ["full_sft_64", "rl_64"]
    assert app.selectbox(key="adapter").options == ["（不用）", "lora_deer_64"]
    app.toggle(key="compare").set_value(True).run()
    app.selectbox(key="adapter").set_value("lora_deer_64").run()
    app.selectbox(key="model2").set_value("rl_64").run()
    send(app, "你好")
    deer = replies(out_dir, "full_sft_64.pth", "你好", lora=["lora_deer_64.pth"])
    assert texts(app) == ["你好", *deer, *replies(out_dir, "rl_64.pth", "你好")]
    assert "full_sft_64 + lora_deer_64 · " in captions(app) and "rl_64 · " in captions(app)

    app.selectbox(key="adapter2").set_value("lora_deer_64").run()
    click(app, "again")
    assert texts(app)[1:] == [*deer, ""] and len(app.error) == 1
    assert "was trained on full_sft_64.pth" in app.error[0].value.replace("\\", "")

    app.segmented_control(key="language").set_value("English").run()
    assert "tokens/s" in captions(app) and app.button(key="again").label == "Regenerate"
    assert app.toggle(key="compare").value and texts(app)[1] == deer[0], "another language changes nothing else"


def test_every_text_is_in_both_languages():
    source = PAGE.read_text(encoding="utf-8")
    start = source.index("TEXTS = {")
    space: dict = {}
    exec(source[start : source.index("\n}\n", start) + 2], space)
    assert all(len(pair) == 2 and all(pair) for pair in space["TEXTS"].values())
    fields = [[text.count("{") for text in pair] for pair in space["TEXTS"].values()]
    assert all(chinese == english for chinese, english in fields)
    body = source[source.index("\ndef say(") :]
    assert not [c for c in body.replace('"中文"', "").replace('"语言 Language"', "") if "\u4e00" <= c <= "\u9fff"]


def test_what_was_said_until_a_click_is_kept_and_the_model_stops(page, monkeypatch):
    closed = []

    def follow(self, request):
        try:
            yield Progress("说到", 2, 0.1, None)
            st.stop()  # as a click on the page does, wherever the script is
        finally:
            closed.append(True)

    monkeypatch.setattr(ChatModel, "follow", follow)
    app = send(page(), "讲个故事")
    assert closed == [True]
    app.run()
    assert texts(app) == ["讲个故事", "说到"] and "已停止" in captions(app) and "2 词元 · 20 词元/秒" in captions(app)


def test_a_conversation_comes_back_from_its_file(page, monkeypatch):
    files, button = [], st.download_button
    monkeypatch.setattr(
        st, "download_button", lambda label, data, **more: (files.append(data), button(label, data, **more))
    )
    app = page()
    app.toggle(key="compare").set_value(True).run()
    app.selectbox(key="model2").set_value("rl_64").run()
    app.text_area(key="system").set_value("系统")
    send(app, "<b>问</b>\u2028一")
    shown = texts(app)
    data = files[-1]
    messages = [
        [
            {"role": "system", "content": "系统"},
            {"role": "user", "content": shown[0]},
            {"role": "assistant", "content": answer},
        ]
        for answer in shown[1:]
    ]
    assert [json.loads(line) for line in data.split("\n")[:-1]] == [{"conversations": part} for part in messages]

    again = page()
    upload(again, data.encode())
    assert texts(again) == shown and again.text_area(key="system").value == "系统" and not again.error
    upload(again, json.dumps({"conversations": messages[0]}, indent=1).encode("utf-8-sig"))
    assert texts(again) == shown[:2]
    first, other = json.dumps({"q": "问", "a": "答"}), json.dumps({"q": "又问", "a": "答"})
    for damaged in (data.encode()[:-9], b"\xff\xfe", b"[1]", b"7", b"[" * 100000, f"{first}\n{other}".encode(), b"{}"):
        upload(again, damaged)
        assert (
            len(again.error) == 1
            and "\n" not in again.error[0].value
            and "x.jsonl" in again.error[0].value.replace("\\", "")
        )
        assert texts(again) == shown[:2], "nothing is lost"
    assert not again.run().error


def test_without_a_model_the_page_says_how_to_make_one(page, tmp_path):
    app = page("--out_dir", str(tmp_path))
    assert app.code[0].value == "bash scripts/quickstart.sh" and app.chat_input[0].disabled
    (tmp_path / "full_sft_64.pth").write_bytes(b"not a model")
    app = send(page("--out_dir", str(tmp_path)), "你好")
    assert texts(app) == ["你好", ""] and "damaged" in app.error[0].value and "\n" not in app.error[0].value


class Server(BaseHTTPRequestHandler):
    """Says 你好 in two pieces, and keeps what it was asked."""

    asked: list[dict] = []

    def do_GET(self):
        self.reply("application/json", b'{"object": "list", "data": [{"id": "m_1", "object": "model"}]}')

    def do_POST(self):
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        pieces = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in "你好"]
        pieces += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}]
        pieces += [{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}}]
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
        self.reply("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]).encode())

    def reply(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def test_a_server_answers_instead(page):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/v1"
    app = page("--api_base", base)
    assert app.selectbox(key="model").options == ["m_1"]
    send(app, "问题")
    assert texts(app) == ["问题", "你好"]
    assert "m_1 · 7 词元" in captions(app) and "达到最大长度" in captions(app)
    (asked,) = Server.asked
    assert asked["messages"] == [{"role": "user", "content": "问题"}] and asked["stream"] is True
    assert {name: asked[name] for name in ("model", "max_tokens", "temperature", "top_p", "top_k", "seed")} == {
        "model": "m_1", "max_tokens": 512, "temperature": 0.5, "top_p": 1.0, "top_k": 14, "seed": 3
    }  # fmt: skip
    assert "repetition_penalty" not in asked
    server.shutdown()
    server.server_close()
    click(app, "again")
    assert texts(app) == ["问题", ""] and base in app.error[0].value.replace("\\", "")


def test_python_alone_says_how_to_open_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PAGE)])
    stage("fast_inference")()
    assert f"streamlit run {PAGE}" in capsys.readouterr().out


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def address(tmp_path):
    """The page of a server started as the user does, from another folder; its models take seconds for an answer."""
    tokenizer = load_tokenizer()
    config = LMConfig(dim=64, n_layers=20, n_heads=4, n_kv_heads=2, hidden_dim=64, max_seq_len=1000)
    for name in ("full_sft", "rl"):
        meta = {"config": config.to_dict(), "tokenizer": tokenizer.fingerprint, "args": {}, "stage": name}
        save_weights(tmp_path / f"{name}_64.pth", Transformer(config).state_dict(), meta)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(PAGE), "--server.headless", "true"]
    command += ["--server.port", str(port), "--", "--out_dir", str(tmp_path)]
    with open(tmp_path / "log", "w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=environment)
    while "http://127.0.0.1" not in (tmp_path / "log").read_text():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=30)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not chromium or not driver:
        pytest.skip("there is no chromium with chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    driver.implicitly_wait(20)
    yield driver
    driver.quit()


class Visitor:
    """What a person does with the page."""

    def __init__(self, browser, address: str):
        self.browser = browser
        browser.get(address)

    def find(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def ask(self, question: str) -> None:
        self.find('[data-testid="stChatInputTextArea"]').send_keys(question + "\n")

    def click(self, key: str) -> None:
        self.find(f".st-key-{key} button, .st-key-{key} label").click()

    def choose(self, key: str, option: str) -> None:
        self.find(f".st-key-{key} input").send_keys(option + "\n")

    def texts(self) -> list[str]:
        script = "return [...document.querySelectorAll('[data-testid=\"stText\"]')].map(e => e.textContent)"
        return self.browser.execute_script(script)

    def wait(self, condition):
        """The first true value of the condition."""
        end = time.monotonic() + 60
        while not (value := condition()):
            assert time.monotonic() < end, self.find("body").text
            time.sleep(0.05)
        return value

    def shows(self, text: str) -> bool:
        return text in self.browser.execute_script("return document.body.innerText")

    def is_dark(self) -> bool:
        script = "return getComputedStyle(document.querySelector('.stApp')).backgroundColor"
        return sum(map(int, re.findall(r"\d+", self.browser.execute_script(script))[:3])) < 3 * 128


@pytest.mark.slow
def test_in_a_real_browser(address, browser):
    page = Visitor(browser, address + "?language=English")
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)> **b**"
    page.ask(attack)
    lengths = [page.wait(lambda: len(page.texts()) == 2 and page.texts()[1] != "…" and len(page.texts()[1]))]
    for _ in range(3):
        lengths.append(page.wait(lambda: (n := len(page.texts()[1])) > lengths[-1] and n))  # noqa: B023
    page.click("stop")
    page.wait(lambda: page.shows("stopped"))
    question, stopped = page.texts()
    assert question == attack and len(stopped) >= lengths[-1]
    time.sleep(1)
    assert page.texts() == [question, stopped], "it has really stopped"

    page.click("again")
    page.wait(lambda: page.shows("Stop"))
    page.wait(lambda: page.shows("reached the maximum length") and page.shows("Regenerate"))
    assert len(page.texts()) == 2 and page.texts()[1] != stopped

    page.choose("model", "rl_64")
    page.ask("第二个问题")
    page.wait(lambda: len(page.texts()) == 4 and page.shows("rl_64 · 512 tokens"))
    kept = page.texts()
    browser.refresh()
    page.wait(lambda: page.texts() == kept)
    assert page.shows("Regenerate") and "model=rl_64" in browser.current_url, "settings are kept too"

    page.click("compare")
    page.wait(lambda: page.shows("Model 2"))
    page.ask("两个")
    page.wait(lambda: len(page.texts()) == 7 and page.shows("Stop") and page.texts()[5] != "…" != page.texts()[6])
    page.wait(lambda: page.shows("full_sft_64 · 512 tokens") and not page.shows("Stop"))

    for theme in ("Dark", "Light"):
        page.find('[data-testid="stMainMenu"] button').click()
        browser.find_element("xpath", f"//*[text()='{theme}']").click()
        page.wait(lambda: page.is_dark() == (theme == "Dark"))  # noqa: B023
        browser.refresh()
        page.wait(lambda: len(page.texts()) == 7)
        assert page.is_dark() == (theme == "Dark"), "it is kept"
    made = browser.execute_script("return document.querySelectorAll('.stText :is(script, img, strong)').length")
    assert made == 0, "text makes no elements"
