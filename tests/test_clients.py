"""Real clients against a real server on a real port: all slow, each client in an environment of its own.

CLIENT_ENVS=FOLDER names a folder where they are kept (npm/, langchain/, schemathesis/); what is missing there is
installed. Without it they are installed into a temporary folder, each time anew.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.checkpoint import save_weights
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import load_tokenizer
from model.tools import flatten, open_reply

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[1]
KEY = "a-key-for-tests"
POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK = {"role": "user", "content": "北京天气怎么样？"}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}
LESSONS = {
    "chat": {"messages": [{"role": "user", "content": "你好"}], "reply": "你好！我是MiniMind，很高兴见到你。"},
    "call": {
        "messages": [ASK],
        "tools": [WEATHER],
        "reply": 'Thought: 查一查。\nAction: get_weather\nAction Input: {"city": "北京"}',
        "name": "get_weather",
        "arguments": {"city": "北京"},
    },
    "result": {"content": "晴，12度", "reply": "今天北京晴，12度。"},
    "json": {"messages": [{"role": "user", "content": "用JSON写出来"}], "reply": '{"city": "北京", "degrees": 12}'},
}


def lessons(tokenizer) -> list[tuple[list[int], list[int]]]:
    """(prompt, reply) of what the clients ask, as the server's prompts are made."""

    def lesson(messages: list[dict], reply: str, tools=None) -> tuple[list[int], list[int]]:
        turns = flatten(messages, tools)
        begun = open_reply(turns)
        prompt = tokenizer.encode_chat(turns[:-1] if begun else turns) + tokenizer.encode(begun)
        return prompt, [*tokenizer.encode(reply), tokenizer.eos_id]

    chat, call, result, as_json = LESSONS.values()
    steps = [{"role": "assistant", "content": None, "tool_calls": [CALLED]}]
    thought = {"role": "assistant", "content": "查一查。", "tool_calls": [CALLED]}
    tool = {"role": "tool", "tool_call_id": "call_1", "content": result["content"]}
    final = f" I now know the final answer.\nFinal Answer: {result['reply']}"
    return [
        lesson(chat["messages"], chat["reply"]),
        lesson(as_json["messages"], as_json["reply"]),
        lesson([ASK], call["reply"], [WEATHER]),
        lesson([ASK, *steps, tool], final, [WEATHER]),
        lesson([ASK, thought, tool], final, [WEATHER]),
    ]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A model that knows these lessons by heart."""
    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(), Transformer(LMConfig(dim=128, n_layers=2, n_heads=4, n_kv_heads=2))
    rows = [torch.tensor(prompt + reply) for prompt, reply in lessons(tokenizer)]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    learn = torch.zeros_like(batch, dtype=torch.bool)  # the positions whose next token is the reply's
    for where, row, (prompt, _) in zip(learn, rows, lessons(tokenizer), strict=True):
        where[len(prompt) - 1 : len(row) - 1] = True
    targets = batch.roll(-1, 1)[learn]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        loss = F.cross_entropy(model(batch, select=learn)[0], targets)
        if loss < 0.005:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    path = tmp_path_factory.mktemp("weights") / "full_sft_128.pth"
    meta = {"config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint, "stage": "full_sft", "args": {}}
    save_weights(path, model.state_dict(), meta)
    return path


@pytest.fixture
def server(weights, tmp_path):
    """The base URL of a server with these weights; after the test it must still be well, and end when told to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(REPO / "my_openai_api.py"), "--weight", str(weights), "--port", str(port)]
    log = tmp_path / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--api_key", KEY], stdout=file, stderr=file)
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        assert process.poll() is None, "the server has ended"
        process.terminate()
        process.wait(60)
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()


def install(command: list, where: Path) -> None:
    """Runs an installer; skips the test if it fails, which is what no network looks like."""
    done = subprocess.run([str(part) for part in command], cwd=where, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{command[0]} could not install: {(done.stderr or done.stdout).strip()[-300:]}")


@pytest.fixture
def environment(tmp_path):
    """environment(name, *packages): the folder of a virtual environment that has them."""

    def make(name: str, *packages: str) -> Path:
        folder = Path(os.environ.get("CLIENT_ENVS", tmp_path)) / name
        if not (folder / "installed").exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            install([folder / "bin/pip", "install", "--quiet", *packages], folder)
            (folder / "installed").touch()
        return folder

    return make


def run(command: list, where: Path, limit_s: int) -> str:
    """The output of a client; fails with it if the client does."""
    plain = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    command = [str(part) for part in command]
    done = subprocess.run(
        command, cwd=where, env=plain, timeout=limit_s, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture
def lessons_file(tmp_path) -> Path:
    path = tmp_path / "lessons.json"
    path.write_text(json.dumps(LESSONS), encoding="utf-8")
    return path


def test_the_openai_npm_client(server, tmp_path, lessons_file):
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    folder = Path(os.environ.get("CLIENT_ENVS", tmp_path)) / "npm"
    folder.mkdir(exist_ok=True)
    if not (folder / "node_modules/openai").exists():
        install(["npm", "install", "--no-save", "--prefix", folder, "openai@^6"], folder)
    script = shutil.copy(REPO / "tests/clients/openai_client.mjs", folder)  # node looks for modules beside the script
    output = run(["node", script, f"{server}/v1", KEY, lessons_file], folder, 120)
    assert output.count("ok ") == 12, output


def test_langchain(server, environment, tmp_path, lessons_file):
    python = environment("langchain", "langchain-openai>=1,<2") / "bin/python"
    script = REPO / "tests/clients/langchain_client.py"
    assert run([python, script, f"{server}/v1", KEY, lessons_file], tmp_path, 120).count("ok ") == 8


def test_schemathesis_finds_no_5xx(server, environment, tmp_path):
    """Requests made up from the server's own description, right and wrong ones."""
    schemathesis = environment("schemathesis", "schemathesis>=4,<5") / "bin/schemathesis"
    command = [schemathesis, "run", f"{server}/openapi.json", "--header", f"Authorization: Bearer {KEY}"]
    command += ["--checks", "not_a_server_error", "--max-examples", "60", "--seed", "1", "--max-time", "180"]
    output = run([*command, "--request-timeout", "60", "--suppress-health-check", "all"], tmp_path, 400)
    metrics = urllib.request.urlopen(f"{server}/metrics").read().decode()
    answered = re.findall(r'http_requests_total\{endpoint="(/v1/[a-z/]+)",status="200"\} (\d+)', metrics)
    counts = {path: int(count) for path, count in answered}
    assert min(counts.get(path, 0) for path in POSTS) >= 20, output  # else it was refused everything
    assert 'status="500"' not in metrics


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_a_crowd_that_hangs_up(weights, tmp_path):
    """Two minutes of 64 clients: every answer as if asked alone, memory flat, slots free at the end."""
    output = run([sys.executable, REPO / "scripts/soak.py", "--", "--weight", weights], tmp_path, 300)
    assert "answers all the same: True; memory flat: True; slots all free: True" in output
