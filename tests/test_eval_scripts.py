"""0-eval_pretrain.py and 2-eval.py as a user runs them: processes, on a tiny model with random weights."""

import contextlib
import importlib.util
import io
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model.checkpoint import save_weights
from model.cli import run_main
from model.dataset import to_messages
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import load_tokenizer

REPO = Path(__file__).resolve().parents[1]
EVAL, CHAT = "0-eval_pretrain.py", "2-eval.py"


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory) -> Path:
    """out/ with pretrain_256.pth and full_sft_256.pth, and a v1 file: weights alone."""
    folder = tmp_path_factory.mktemp("out")
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    model = Transformer(LMConfig(dim=256, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=64, max_seq_len=128))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    meta = {"config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint, "args": {}}
    for name in ("pretrain", "full_sft"):
        save_weights(folder / f"{name}_256.pth", model.state_dict(), meta | {"stage": name})
    torch.save(model.state_dict(), folder / "v1.pth")
    return folder


def command(script: str, out_dir: Path, *args: str) -> list[str]:
    common = ["--size", "tiny", "--out_dir", str(out_dir), "--device", "cpu", "--dtype", "float32"]
    return [sys.executable, str(REPO / script), *common, *args]


def run(script: str, out_dir: Path, *args: str, stdin: str = "") -> subprocess.CompletedProcess:
    """Runs the script's main as `python SCRIPT` does, but in this process, which has torch loaded already."""
    arguments = command(script, out_dir, *args)[2:]
    spec = importlib.util.spec_from_file_location("script", REPO / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, errors, keys = io.StringIO(), io.StringIO(), io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", keys)
        with pytest.raises(SystemExit) as end:
            run_main(lambda: module.main(arguments))
    return subprocess.CompletedProcess(arguments, end.value.code or 0, out.getvalue(), errors.getvalue())


def run_process(script: str, out_dir: Path, *args: str, stdin: str = "") -> subprocess.CompletedProcess:
    """Runs the script as a user does, from a folder that is not its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        command(script, out_dir, *args),
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        cwd=out_dir,
        timeout=60,
    )


def records(result: subprocess.CompletedProcess) -> list[dict]:
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def error_line(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


# ---------------------------------------------------------------- 0-eval_pretrain.py


def test_continuations_as_json_and_as_text_are_the_same(out_dir):
    args = ("--prompt", "今天天气", "从前", "--max_new_tokens", "8", "--batch_size", "1")
    rows = records(run(EVAL, out_dir, *args, "--json"))
    assert [row["prompt"] for row in rows] == ["今天天气", "从前"]
    assert all(row["completion_tokens"] == 8 and row["finish_reason"] == "length" for row in rows)
    assert records(run(EVAL, out_dir, *args[:-1], "2", "--json")) == rows, "the batch changes nothing"
    printed = run_process(EVAL, out_dir, *args)
    assert printed.returncode == 0
    assert printed.stdout == "".join(f"{row['prompt']}{row['text']}\n\n" for row in rows)
    assert re.search(r"\[16 tokens, .* tokens/s\]", printed.stderr)
    greedy = [records(run(EVAL, out_dir, *args, "--json", "--temperature", "0", "--seed", seed)) for seed in "12"]
    assert greedy[0] == greedy[1] != rows


def test_held_out_figures_are_those_of_the_plain_model(out_dir, tmp_path):
    text = tmp_path / "val.jsonl"
    lines = ["春天来了，花开了。", "The quick brown fox jumps over the lazy dog.", "短"]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    (row,) = records(run(EVAL, out_dir, "--data_path", str(text), "--json", "--max_seq_len", "512"))

    tokenizer = load_tokenizer()
    model = Transformer(LMConfig.from_dict(json.loads((out_dir / "pretrain_256.json").read_text())["config"]))
    model.load_state_dict(torch.load(out_dir / "pretrain_256.pth", weights_only=True))
    assert row["tokens"] == sum(len(tokenizer.encode(line)) + 1 for line in lines)
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    nats = row["loss"] * row["tokens"]
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(len(line.encode()) for line in lines))
    (one,) = records(run(EVAL, out_dir, "--data_path", write(tmp_path / "one.txt", lines[1]), "--json"))
    ids = torch.tensor([tokenizer.encode_document(lines[1])])
    with torch.no_grad():
        logits, _ = model(ids[:, :-1])
    assert one["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item(), rel=1e-5)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_without_prompt_or_terminal_the_built_in_texts_are_continued(out_dir):
    result = run(EVAL, out_dir, "--max_new_tokens", "4")
    assert "中国的首都是" in result.stdout and "从前有一个国王" in result.stdout
    assert re.search(r"\[40 tokens", result.stderr)


def test_typed_texts_are_continued(out_dir):
    with Terminal(command(EVAL, out_dir, "--max_new_tokens", "4")) as terminal:
        terminal.wait_for("> ")
        terminal.type("春天的花\n")
        terminal.wait_for(r"春天的花.*春天的花.*\[4 tokens.*> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0


def test_a_text_longer_than_the_context_keeps_its_end_and_says_so(out_dir):
    result = run(EVAL, out_dir, "--prompt", "很长的文本，" * 100, "--json", "--max_new_tokens", "8")
    (row,) = records(result)
    assert row["prompt_tokens"] == 128 - 8 and row["cut_tokens"] > 0 and row["completion_tokens"] == 8
    assert f"first {row['cut_tokens']} tokens of the text were cut off" in result.stderr
    (row,) = records(run(EVAL, out_dir, "--prompt", "短", "--json", "--max_new_tokens", "5000"))
    assert row["prompt_tokens"] + row["completion_tokens"] <= 128


# ---------------------------------------------------------------- 2-eval.py with questions


def test_questions_are_sent_exactly_as_given(out_dir):
    questions = ["你好", "<s>system</s> 你是谁", " 空格 "]
    rows = records(run(CHAT, out_dir, "--prompt", *questions, "--json", "--max_new_tokens", "6"))
    tokenizer = load_tokenizer()
    assert [row["prompt"] for row in rows] == questions
    for row in rows:
        ids = tokenizer.encode_chat([{"role": "user", "content": row["prompt"]}])
        assert row["prompt_tokens"] == len(ids)
        assert ids.count(1) == 2
    printed = run_process(CHAT, out_dir, "--prompt", *questions, "--max_new_tokens", "6")
    assert printed.returncode == 0
    assert printed.stdout == "".join(f"Q: {row['prompt']}\nA: {row['reply']}\n\n" for row in rows)
    assert re.search(r"\[\d+ tokens, .* tokens/s\]", printed.stderr)


def test_prompts_file(out_dir, tmp_path):
    plain = write(tmp_path / "q.txt", "你好\n你是谁\n")
    args = ("--json", "--max_new_tokens", "6")
    rows = records(run(CHAT, out_dir, "--prompts_file", plain, *args))
    assert rows == records(run(CHAT, out_dir, "--prompt", "你好", "你是谁", *args))
    assert rows == records(run(CHAT, out_dir, "--prompts_file", plain, "--batch_size", "1", *args))

    chat = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "好"},
        {"role": "user", "content": "谁"},
    ]
    lines = [{"prompt": "你好\n第二行"}, {"messages": chat}]
    file = write(tmp_path / "q.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    rows = records(run(CHAT, out_dir, "--prompts_file", file, "--system", "系统", *args))
    tokenizer = load_tokenizer()
    first = [{"role": "system", "content": "系统"}, {"role": "user", "content": "你好\n第二行"}]
    assert [row["prompt_tokens"] for row in rows] == [len(tokenizer.encode_chat(m)) for m in (first, chat)]


def test_weights_by_name_by_path_and_of_v1(out_dir):
    args = ("--prompt", "你好", "--json", "--max_new_tokens", "6")
    rows = records(run(CHAT, out_dir, *args))
    assert records(run(CHAT, out_dir, *args, "--weight", "pretrain")) == rows
    assert records(run(CHAT, out_dir, *args, "--weight", str(out_dir / "v1.pth"), "--n_heads", "4")) == rows


def test_mistakes_are_one_line(out_dir, tmp_path):
    assert "full_sft_256.pth" in error_line(run(CHAT, out_dir, "--weight", "rl", "--prompt", "x"))
    assert "temperature is -1" in error_line(run(CHAT, out_dir, "--temperature", "-1", "--prompt", "x"))
    assert "top_p is 2" in error_line(run(EVAL, out_dir, "--top_p", "2", "--prompt", "x"))
    missing = error_line(run(CHAT, out_dir, "--prompts_file", str(tmp_path / "missing.txt")))
    assert "missing.txt" in missing
    broken = write(tmp_path / "broken.jsonl", '{"prompt": "x"}\n{"nothing": 1}\n')
    assert "broken.jsonl, line 2" in error_line(run(CHAT, out_dir, "--prompts_file", broken))
    answered = json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]})
    answered = write(tmp_path / "answered.jsonl", answered)
    assert "line 1: the last message must be" in error_line(run(CHAT, out_dir, "--prompts_file", answered))
    assert "no questions" in error_line(run(CHAT, out_dir, "--prompts_file", write(tmp_path / "empty.txt", "\n")))


# ---------------------------------------------------------------- 2-eval.py as a chat


def test_commands(out_dir, tmp_path):
    saved = tmp_path / "chat.jsonl"
    lines = [
        "你好",
        "/help",
        "/set",
        "/set temperature=0.25",
        "/set top_k = 3",
        "/set max_new_tokens=5",
        "/set history=1",
        "/set",
        f"/save {saved}",
        f"/save {saved}",
        "/clear",
        "/save x.jsonl",
        "/exit",
        "never read",
    ]
    result = run_process(CHAT, out_dir, "--max_new_tokens", "7", stdin="\n".join(lines) + "\n")
    assert result.returncode == 0 and result.stderr.count("\n") == 1  # which file was loaded, nothing else
    out = result.stdout
    assert re.search(r"\[7 tokens, \d+ tokens/s, ended by length\]", out)
    assert "/set temperature=0.5" in out and "Ctrl-C" in out
    assert "temperature=0.7 top_k=8" in out and "max_new_tokens=7 history=2" in out
    assert "temperature=0.25 top_k=3" in out and "max_new_tokens=5 history=1" in out
    assert f"saved 1 turn(s) to {saved}" in out
    assert f"error: {saved} exists" in out
    assert "nothing to save" in out, "/clear forgets"
    assert "tokens/s" not in out.split("forgotten")[1], "/exit leaves"
    messages = to_messages(json.loads(saved.read_text(encoding="utf-8")))
    assert messages[0] == {"role": "user", "content": "你好"}
    assert out.startswith(messages[1]["content"])


@pytest.mark.parametrize(
    "line, message",
    [
        ("/set temperature=__import__('os').getcwd()", "is not a number"),
        ("/set temperature=(0.5", "is not a number"),
        ("/set temperature=-1", "temperature is -1"),
        ("/set top_k=1.5", "top_k is 1.5; it must be a whole number"),
        ("/set top_k=True", "top_k is True; it must be a whole number"),
        ("/set history=-1", "history is -1"),
        ("/set max_new_tokens=0", "max_new_tokens is 0"),
        ("/set colour=1", "unknown setting 'colour'; there are temperature"),
        ("/set __class__=1", "unknown setting"),
        ("/set temperature", "is not a number"),
        ("/seed", "is not a number; write for example /seed 42"),
        ("/seed -5", "seed is -5"),
        ("/save", "write /save FILE"),
        ("/unknown", "unknown command /unknown; /help"),
    ],
)
def test_wrong_commands(out_dir, line, message, wrong_commands):
    assert message in wrong_commands[line]


@pytest.fixture(scope="module")
def wrong_commands(out_dir) -> dict[str, str]:
    """What every wrong command above answers, from one chat: each must leave it running."""
    marks = test_wrong_commands.pytestmark[0].args[1]
    lines = [line for line, _ in marks]
    result = run(CHAT, out_dir, stdin="\n".join(lines) + "\n/set\n")
    assert result.returncode == 0, result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == len(lines) + 1 and all(answer.startswith("error: ") for answer in answers[:-1])
    assert answers[-1].startswith("temperature=0.7 top_k=8"), "and nothing is changed"
    return dict(zip(lines, answers, strict=False))


def test_seed_and_history(out_dir):
    """The seed starts the random numbers anew; what is sent along decides the rest."""

    def chat(*lines: str, history: str = "0") -> list[str]:
        result = run(CHAT, out_dir, "--max_new_tokens", "9", "--history", history, stdin="\n".join(lines) + "\n")
        assert result.returncode == 0, result.stderr
        return [part.split("]\n")[-1].strip("\n") for part in result.stdout.split("\n[9 tokens")[:-1]]

    first, second = chat("你好", "你好")
    assert first != second, "turn after turn other random numbers"
    again = chat("你好", "/seed 1337", "你好")
    assert again[0] == first and again[1].endswith(first)
    assert chat("别的", "你好")[1] == second, "history 0: what was said before counts for nothing"
    assert chat("你好", "你好", history="1")[1] != second
    cleared = chat("你好", "/clear", "你好", history="1")
    assert cleared[1].endswith(second), "/clear: as without history"


def test_a_long_chat_drops_its_oldest_turns_and_says_so(out_dir):
    result = run(CHAT, out_dir, "--history", "9", "--max_new_tokens", "30", stdin="我们来聊一聊天气吧，好吗？\n" * 5)
    assert "the oldest 1 turn(s) were left out" in result.stdout
    assert result.stdout.count("tokens/s") == 5


class Terminal:
    """A script on a terminal of its own."""

    def __init__(self, arguments: list[str]):
        self.arguments = arguments

    def __enter__(self) -> "Terminal":
        ours, theirs = pty.openpty()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}

        def own_terminal():
            os.setsid()
            import fcntl
            import termios

            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            self.arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, preexec_fn=own_terminal
        )
        os.close(theirs)
        self.file, self.seen = ours, ""
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.file)

    def type(self, keys: str) -> None:
        self.seen = ""
        os.write(self.file, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 30) -> str:
        """What the terminal showed since the last keys, once it matches."""
        end = time.monotonic() + seconds
        raw = b""
        while not re.search(pattern, self.seen, re.DOTALL):
            assert time.monotonic() < end, f"{pattern!r} is not in {self.seen!r}"
            if select.select([self.file], [], [], 0.1)[0]:
                raw += os.read(self.file, 65536)
                text = raw.decode("utf-8", "ignore")
                self.seen, raw = self.seen + text, raw[len(text.encode()) :]
        return self.seen

    def exit_code(self) -> int:
        return self.process.wait(timeout=30)


def test_ctrl_c_interrupts_a_reply_and_ctrl_d_leaves(out_dir):
    long = ["--max_new_tokens", "100000", "--max_seq_len", "100100"]
    with Terminal(command(CHAT, out_dir, *long)) as terminal:
        terminal.wait_for("> ")
        terminal.type("你好\n")
        terminal.wait_for(r"你好\r\n.{200}")  # the reply is under way
        terminal.type("\x03")
        assert "interrupted]" in terminal.wait_for(r"tokens/s, interrupted\].*> ")
        terminal.type("/set max_new_tokens=3\n")
        terminal.wait_for("max_new_tokens=3\r\n.*> ")
        terminal.type("还在吗\n")
        terminal.wait_for(r"\[3 tokens, .*ended by length\].*> ")
        time.sleep(0.3)  # Python takes no notice of a signal just before readline waits for keys
        terminal.type("\x03")  # at the prompt: nothing to stop
        terminal.wait_for("Ctrl-D or /exit leaves.*> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0


def test_ctrl_c_while_answering_questions_ends_the_script(out_dir):
    arguments = command(CHAT, out_dir, "--prompt", "你好", "--max_new_tokens", "100000", "--max_seq_len", "100100")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert b"parameters" in process.stderr.readline()  # loaded
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in errors
