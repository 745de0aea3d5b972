"""A chat page in the browser, by default for this machine only.

Reads   the models and adapters in out/, or asks a server with --api_base
Writes  nothing; a button exports the conversation as a file that 3-full_sft.py reads
Run     streamlit run fast_inference.py                        http://127.0.0.1:8501
        streamlit run fast_inference.py -- --out_dir FOLDER    the page's own arguments go after --
        streamlit run fast_inference.py -- --api_base http://127.0.0.1:8000/v1
                                                               any OpenAI-compatible server (key: OPENAI_API_KEY)

浏览器里的聊天页面，默认只有本机能打开。
读入    out/ 中的模型和适配器，或用 --api_base 连接服务器
写出    无；可用按钮把对话导出成 3-full_sft.py 能读取的文件
运行    streamlit run fast_inference.py（打开 http://127.0.0.1:8501）
        streamlit run fast_inference.py -- --out_dir FOLDER（页面自己的参数写在 -- 之后）
        streamlit run fast_inference.py -- --api_base http://127.0.0.1:8000/v1
        （任何兼容 OpenAI 的服务器；密钥取自环境变量 OPENAI_API_KEY）
"""

import argparse
import json
import os
import re
import string
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import streamlit as st

from model.chat import ChatModel, Progress, conversation
from model.cli import ROOT, one_line
from model.dataset import to_messages

TEXTS = {  # Chinese, English
    "settings": ("设定调整", "Settings"),
    "model": ("模型", "Model"),
    "adapter": ("适配器", "Adapter"),
    "no_adapter": ("（不用）", "(none)"),
    "compare": ("两个模型对比", "Two models side by side"),
    "history": ("携带历史对话条数（一问一答为两条）", "Earlier messages sent along (an answer is one too)"),
    "max_new_tokens": ("最大生成长度（词元）", "Maximum length (tokens)"),
    "top_k": ("top-k（0：不限）", "top-k (0: no limit)"),
    "top_p": ("top-p", "top-p"),
    "temperature": ("温度", "Temperature"),
    "repetition_penalty": ("重复惩罚", "Repetition penalty"),
    "seed": ("随机种子（相同则回答相同）", "Seed (the same again: the same answer)"),
    "seed_hint": ("每次不同", "another each time"),
    "system": ("系统提示", "System prompt"),
    "clear": ("清空对话", "Clear the conversation"),
    "export": ("导出对话", "Export the conversation"),
    "import": ("导入对话", "Import a conversation"),
    "theme": ("浅色与深色：右上角菜单 ⋮", "Light and dark: the menu ⋮ at the top right"),
    "placeholder": ("给 MiniMind 发送消息", "Message MiniMind"),
    "stop": ("停止", "Stop"),
    "again": ("重新生成", "Regenerate"),
    "edit": ("修改问题", "Edit the question"),
    "send": ("发送", "Send"),
    "cancel": ("取消", "Cancel"),
    "copy": ("复制", "Copy"),
    "loading": ("正在加载模型……", "Loading the model..."),
    "count": ("{tokens} 词元 · {rate:.0f} 词元/秒", "{tokens} tokens · {rate:.0f} tokens/s"),
    "length": ("达到最大长度", "reached the maximum length"),
    "cancelled": ("已停止", "stopped"),
    "dropped": ("上下文放不下，略去了最早的 {} 轮", "too long for the context: the oldest {} turn(s) were left out"),
    "cut": ("问题太长，略去了开头 {} 个词元", "too long for the context: the first {} tokens were cut off"),
    "no_weights": ("{} 里还没有模型。这条命令训练一个：", "There is no model in {} yet. This command makes one:"),
    "error": ("出错了：", "Error: "),
    "bad_import": ("没有导入 {}：", "{} was not imported: "),
}
SLIDERS = {  # lowest, highest, default, step
    "history": (0, 6, 0, 2),
    "max_new_tokens": (256, 768, 512, 1),
    "top_k": (0, 16, 14, 1),
    "temperature": (0.3, 1.3, 0.5, 0.01),
    "top_p": (0.05, 1.0, 1.0, 0.05),
    "repetition_penalty": (1.0, 2.0, 1.0, 0.05),
}


def say(key: str, *values, **named) -> str:
    """A text of the page in the language chosen."""
    return TEXTS[key][st.session_state.language == "English"].format(*values, **named)


def plain(text: str) -> str:
    """Text for Streamlit's Markdown that is to be shown as it is."""
    return re.sub(f"([{re.escape(string.punctuation)}])", r"\\\1", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", default=str(ROOT / "out"), help="folder of the weights (default: out)")
    parser.add_argument("--tokenizer_dir", help="folder with tokenizer.json (default: model/minimind_tokenizer)")
    parser.add_argument("--api_base", help="ask this OpenAI-compatible server, such as http://127.0.0.1:8000/v1")
    args = parser.parse_args()
    if not st.runtime.exists():
        print(f"This page is opened by:  streamlit run {__file__}")
        return

    state = st.session_state
    if "chat" not in state:
        state.chat = find_conversation()
        state.system, state.asking, state.editing, state.notice = state.chat["system"], False, False, ""
    st.set_page_config("MiniMind", ":material/forum:", layout="wide" if state.get("compare") else "centered")
    choices, settings = sidebar(args)
    state.chat["system"] = state.system
    st.header("MiniMind")
    if state.notice:
        st.error(plain(state.notice))
        state.notice = ""
    if question := st.chat_input(say("placeholder"), disabled=not choices, key="question"):
        ask(question)
    turns = state.chat["turns"]
    asking, state.asking = state.asking and bool(choices), False  # whatever interrupts this run ends the answer
    for number, turn in enumerate(turns):
        last = number == len(turns) - 1
        with st.chat_message("user"):
            if last and state.editing:
                edit_form(turn)
            else:
                st.text(turn["question"])
        if last and asking:
            answer(turn, choices, settings, args)
            st.rerun()
        for column, reply in zip(columns(len(turn["answers"])), turn["answers"], strict=True):
            with column, st.chat_message("assistant"):
                show_reply(reply)
        if last and choices:
            change = {"on_click": state.update, "kwargs": {"editing": True}}
            with st.container(horizontal=True):
                if st.button(say("again"), icon=":material/refresh:", key="again"):
                    ask(None)
                st.button(say("edit"), icon=":material/edit:", key="edit", **change)


# ---------------------------------------------------------------- the conversation


@st.cache_resource
def all_conversations() -> dict[str, dict]:
    return {}


def find_conversation() -> dict:
    """The conversation named in the page's address, so that loading the page anew keeps it; the newest 100 are kept.

    turns: [{"question", "answers": [{"text", ...}]}], an answer for each model; all texts as they were written.
    """
    kept, name = all_conversations(), st.query_params.get("chat")
    if name not in kept:
        name = st.query_params["chat"] = uuid.uuid4().hex
        kept[name] = {"turns": [], "system": ""}
        for oldest in list(kept)[:-100]:
            del kept[oldest]
    return kept[name]


def ask(question: str | None) -> None:
    """Asks a question, or None: the last one again; in a new run of the script."""
    state = st.session_state
    if question is None:
        question = state.chat["turns"].pop()["question"]
    state.chat["turns"].append({"question": question, "answers": []})
    state.asking, state.editing = True, False
    st.rerun()


def clear() -> None:
    st.session_state.chat["turns"].clear()
    st.session_state.editing = False


def edit_form(turn: dict) -> None:
    state = st.session_state
    with st.form("edit_form", border=False):
        text = st.text_area(say("edit"), turn["question"], label_visibility="collapsed", key="edited")
        with st.container(horizontal=True):
            send = st.form_submit_button(say("send"), type="primary")
            st.form_submit_button(say("cancel"), on_click=state.update, kwargs={"editing": False})
    if send and text:
        turn["question"] = text
        ask(None)


def pairs(column: int) -> list[tuple[str, str]]:
    """The questions and the answers that this model gave; those without an answer are left out."""
    turns = [turn for turn in st.session_state.chat["turns"] if turn["answers"]]
    found = [(turn["question"], turn["answers"][min(column, len(turn["answers"]) - 1)]["text"]) for turn in turns]
    return [(question, text) for question, text in found if text]


def exported() -> str:
    """A line of JSON for each model, as 3-full_sft.py reads them."""
    turns = st.session_state.chat["turns"]
    lines = [conversation([], pairs(i), st.session_state.system) for i in range(max(len(t["answers"]) for t in turns))]
    return "".join(json.dumps({"conversations": messages}, ensure_ascii=False) + "\n" for messages in lines)


def import_file() -> None:
    """Replaces the conversation by the one uploaded, unless that is damaged."""
    state = st.session_state
    if state.upload is None:
        return
    try:
        text = state.upload.getvalue().decode("utf-8-sig")
        try:
            records = [json.loads(text)]
        except ValueError:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        if not 1 <= len(records) <= 2:
            raise ValueError("it must hold one conversation, or two with the same questions, as an export does")
        found = [to_messages(record) for record in records]
        system = found[0].pop(0)["content"] if found[0][0]["role"] == "system" else ""
        found = [[m["content"] for m in messages if m["role"] != "system"] for messages in found]
        if any(messages[::2] != found[0][::2] for messages in found):
            raise ValueError("its two conversations have different questions")
    except (ValueError, TypeError, RecursionError) as error:
        state.notice = say("bad_import", state.upload.name) + one_line(error)
        return
    replies = zip(*(messages[1::2] for messages in found), strict=True)
    turns = [
        {"question": question, "answers": [{"text": text} for text in texts]}
        for question, texts in zip(found[0][::2], replies, strict=True)
    ]
    state.chat["turns"][:], state.system, state.editing = turns, system, False


# ---------------------------------------------------------------- the sidebar


def sidebar(args: argparse.Namespace) -> tuple[list[tuple], dict]:
    """The models to ask, a (name, adapter or "") each, and the settings."""
    turns = st.session_state.chat["turns"]
    with st.sidebar:
        bound = {"bind": "query-params"}  # in the page's address: loading it anew keeps them
        quiet = {"on_change": "ignore"}  # counts from the next question on; a new run of the script ends an answer
        default = "中文" if (st.context.locale or "zh").startswith("zh") else "English"
        control = {"default": default, "required": True, "label_visibility": "collapsed", **bound}
        st.segmented_control("语言 Language", ["中文", "English"], key="language", **control)
        st.header(say("settings"))
        choices = pick_models(args, bound)
        st.text_area(say("system"), key="system", height=68, **quiet)
        settings = {
            name: st.slider(say(name), *numbers, key=name, **bound, **quiet) for name, numbers in SLIDERS.items()
        }
        bound |= quiet | {"placeholder": say("seed_hint")}
        seed = st.number_input(say("seed"), 0, 2**53 - 1, None, 1, key="seed", **bound)
        st.button(say("clear"), on_click=clear, disabled=not turns, key="clear", width="stretch")
        if any(turn["answers"] for turn in turns):
            file = {"file_name": "conversation.jsonl", "mime": "application/jsonl", "on_click": "ignore"}
            st.download_button(say("export"), exported(), key="export", width="stretch", **file)
        st.file_uploader(say("import"), ["jsonl", "json"], key="upload", on_change=import_file)
        st.caption(say("theme"))
    return choices, settings | {"seed": seed}


def pick_models(args: argparse.Namespace, bound: dict) -> list[tuple]:
    out, files = Path(args.out_dir), []
    try:
        if args.api_base:
            names = served_models(args.api_base)
        else:
            files = [path for path in sorted(out.glob("*.pth")) if not path.stem.endswith(("_resume", "_ref"))]
            folders = [path.parent.name for path in sorted(out.glob("*/config.json"))]
            names = [path.stem for path in files if not path.stem.startswith("lora_")] + folders
            names.sort(key=lambda name: not name.startswith("full_sft"))  # the one to chat with comes first
    except (ValueError, OSError) as error:
        st.session_state.notice = say("error") + one_line(error)
        names = []
    if not names:
        if not args.api_base:
            st.info(say("no_weights", plain(str(out))))
            st.code("bash scripts/quickstart.sh", language="bash")
        return []
    st.toggle(say("compare"), key="compare", **bound)
    choices = []
    for number in ("", " 2")[: 1 + st.session_state.compare]:
        key = number.strip()
        name = st.selectbox(say("model") + number, names, key="model" + key, **bound)
        size = re.search(r"_(\d+(_moe)?)$", name)
        adapters = [p.stem for p in files if size and re.fullmatch(f"lora_.+?{size[0]}", p.stem)]
        adapter = ""
        if adapters:
            none = say("no_adapter")
            shown = {"format_func": lambda stem, none=none: stem or none, **bound}
            adapter = st.selectbox(say("adapter") + number, ["", *adapters], key="adapter" + key, **shown)
        choices.append((name, adapter))
    return choices


# ---------------------------------------------------------------- answers


def columns(count: int) -> list:
    return st.columns(count) if count > 1 else [st.container()][:count]


def show_reply(reply: dict) -> None:
    """An answer, as plain text: nothing in it is taken for Markdown or HTML; below it, what it took."""
    st.text(reply["text"])
    if reply.get("error"):
        st.error(plain(say("error") + reply["error"]))
    facts = [reply["model"]] if "model" in reply else []
    if reply.get("seconds"):
        facts.append(say("count", tokens=reply["tokens"], rate=reply["tokens"] / reply["seconds"]))
    if reply.get("reason") in ("length", "cancelled"):
        facts.append(say(reply["reason"]))
    facts += [say(key, reply[key]) for key in ("dropped", "cut") if reply.get(key)]
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(plain(" · ".join(facts)), width="content")
        if reply["text"]:
            with st.popover(say("copy"), type="tertiary", icon=":material/content_copy:"):
                st.code(reply["text"], language=None, wrap_lines=True)


def answer(turn: dict, choices: list[tuple], settings: dict, args: argparse.Namespace) -> None:
    """Streams an answer of every model, a piece of each in turn, into `turn`.

    A click anywhere on the page ends this run of the script, here where something is drawn: what was said until
    then is in `turn`, and closing the streams makes the models stop.
    """
    streams, history = [], settings.pop("history")
    with ExitStack() as stack:
        for number, (choice, column) in enumerate(zip(choices, columns(len(choices)), strict=True)):
            name, adapter = choice
            reply = {"text": "", "reason": "cancelled", "model": f"{name} + {adapter}" if adapter else name}
            turn["answers"].append(reply)
            with column, st.chat_message("assistant"):
                slot = st.empty()
                slot.text("…")
            recent = pairs(number)[-history // 2 :] if history else []
            messages = conversation(turn["question"], recent, st.session_state.system)
            stream = (served_reply if args.api_base else local_reply)(args, choice, messages, settings, reply)
            streams.append((stack.enter_context(closing(stream)), reply, slot))
        st.button(say("stop"), icon=":material/stop_circle:", key="stop")
        drawn = time.monotonic()
        while streams:
            for entry in list(streams):
                stream, reply, _ = entry
                try:
                    progress = next(stream, None)
                except (ValueError, OSError, RuntimeError, MemoryError) as error:
                    reply["error"], reply["reason"], progress = one_line(error), None, None
                if progress is None:
                    streams.remove(entry)
                else:
                    reply |= {"text": progress.text, "tokens": progress.tokens, "seconds": progress.seconds}
                    reply["reason"] = progress.finish_reason or "cancelled"
            if time.monotonic() - drawn > 0.05:
                drawn = time.monotonic()
                for _, reply, slot in streams:
                    slot.text(reply["text"] or "…")


@st.cache_resource(max_entries=3, show_spinner=False)
def load(files: tuple[tuple[str, int], ...], tokenizer_dir: str | None) -> ChatModel:
    """The model of (file, time of its last change), then of its adapters; all visitors share it, three are kept."""
    path, *lora = (name for name, _ in files)
    return ChatModel.from_pretrained(path, lora=lora, tokenizer_dir=tokenizer_dir, max_batch=8)


def local_reply(args, choice: tuple, messages: list[dict], settings: dict, reply: dict) -> Iterator[Progress]:
    name, adapter = choice
    out = Path(args.out_dir)
    base = out / f"{name}.pth"
    files = [base if base.exists() else out / name, *([out / f"{adapter}.pth"] if adapter else [])]
    with st.spinner(say("loading")):
        model = load(tuple((str(file), file.stat().st_mtime_ns) for file in files), args.tokenizer_dir)
    prompt, request = model.request(messages, **settings)
    reply["dropped"], reply["cut"] = prompt.dropped_turns, prompt.cut_tokens
    yield from model.follow(request)


@st.cache_data(ttl=30, show_spinner=False)
def served_models(api_base: str) -> list[str]:
    with served(api_base) as client:
        return [model.id for model in client.models.list()]


def served_reply(args, choice: tuple, messages: list[dict], settings: dict, reply: dict) -> Iterator[Progress]:
    """What the server streams."""
    sent = {name: settings[name] for name in ("temperature", "top_p", "seed") if settings[name] is not None}
    sent["max_tokens"] = settings["max_new_tokens"]
    more = {"top_k": settings["top_k"]}
    more |= {"repetition_penalty": settings["repetition_penalty"]} if settings["repetition_penalty"] != 1 else {}
    options = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": more}
    text, tokens, reason, started = "", 0, None, time.perf_counter()
    with served(args.api_base) as client:
        with client.chat.completions.create(model=choice[0], messages=messages, **sent, **options) as chunks:
            for chunk in chunks:
                if chunk.choices:
                    text += chunk.choices[0].delta.content or ""
                    reason = chunk.choices[0].finish_reason or reason
                    tokens += 1
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
                yield Progress(text, tokens, time.perf_counter() - started, reason)


@contextmanager
def served(api_base: str) -> Iterator:
    """A client of the server; what goes wrong with it is a ValueError."""
    import httpx  # openai's; both take a second to load, and most need neither
    import openai

    try:
        with openai.OpenAI(
            base_url=api_base,
            api_key=os.environ.get("OPENAI_API_KEY") or os.environ.get("MINIMIND_API_KEY", "none"),
            timeout=120,
            max_retries=0,
        ) as client:
            yield client
    except (openai.OpenAIError, httpx.HTTPError) as error:
        raise ValueError(f"{api_base}: {error}") from None


if __name__ == "__main__":
    main()
