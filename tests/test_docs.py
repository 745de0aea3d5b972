"""The pages in two languages say the same, and every command of the README runs."""

import contextlib
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = REPO / "README.md", REPO / "docs" / "README_zh.md"
PAGES = [(ENGLISH, CHINESE), (REPO / "docs/serving.md", REPO / "docs/serving_zh.md")]


def sections(path: Path) -> list[str]:
    """The text of a page cut before every heading."""
    return re.split(r"^(?=#)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def code_blocks(path: Path) -> list[str]:
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"^ +", "", block, flags=re.MULTILINE) for block in blocks]


def commands() -> list[str]:
    return [line for block in code_blocks(ENGLISH) for line in block.splitlines() if re.match(r"(python|bash) ", line)]


@pytest.mark.parametrize("pages", PAGES, ids=lambda pages: pages[0].name)
def test_both_languages_have_the_same_headings_code_and_numbers(pages):
    english, chinese = map(sections, pages)
    assert [part.split(" ")[0] for part in english] == [part.split(" ")[0] for part in chinese]
    assert code_blocks(pages[0]) == code_blocks(pages[1])
    for part, other in zip(english, chinese, strict=True):
        inline = [set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))) for text in (part, other)]
        assert inline[0] == inline[1], part.splitlines()[0]
        numbers = [sorted(re.findall(r"\d+(?:\.\d+)?", text)) for text in (part, other)]
        assert numbers[0] == numbers[1], part.splitlines()[0]


def test_links_lead_to_files():
    for path in itertools.chain(*PAGES):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_named_files_exist():
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sh|txt))`", ENGLISH.read_text(encoding="utf-8")):
        assert any((REPO / folder / name).exists() for folder in ("", "model", "scripts")), name


def test_every_command_runs(tmp_path):
    """The README's commands in their order, as they stand but for their files and a size that takes seconds.

    The two `bash` commands are what CI runs.
    """
    rows = [{"text": f"第{i}个句子：学而时习之，不亦说乎？有朋自远方来，不亦乐乎？"} for i in range(300)]
    (tmp_path / "CORPUS.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    chats = [
        {"instruction": f"请你解释一下第{i}句话的意思。", "output": f"这是第{i}个回答，谢谢你的提问。"}
        for i in range(300)
    ]
    (tmp_path / "CONVERSATIONS.jsonl").write_text("\n".join(json.dumps(chat) for chat in chats), encoding="utf-8")
    dataset, out = tmp_path / "dataset", tmp_path / "out"
    dataset.mkdir()
    (dataset / "tokenizer_train.jsonl").write_bytes((tmp_path / "CORPUS.jsonl").read_bytes())
    short = ["--out_dir", str(out), "--max_steps", "1", "--max_seq_len", "128", "--batch_size", "2"]
    tiny = [*short, "--device", "cpu", "--dtype", "float32"]
    sft = str(dataset / "sft_data.csv")
    pairs = [{"prompt": f"第{i}个问题？", "chosen": "是的，没错。", "rejected": "不。"} for i in range(20)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    extra = {
        "1-pretrain.py": [*tiny, "--data_path", str(dataset / "pretrain_data.csv"), "--val_path", ""],
        "3-full_sft.py": [*tiny, "--data_path", str(dataset / "sft_data.csv"), "--val_path", ""],
        "0-eval_pretrain.py": ["--out_dir", str(out), "--max_new_tokens", "3", "--prompt", "学而时习之"],
        "2-eval.py": ["--out_dir", str(out), "--max_new_tokens", "3", "--prompt", "你好"],
        "4-lora_sft.py": [*tiny, "--data_path", sft, "--val_path", "", "--replay_path", sft, "--general_path", sft],
        "5-dpo_train.py": [*tiny, "--data_path", str(tmp_path / "pairs.json"), "--val_path", "", "--general_path", ""],
        "my_openai_api.py": ["--out_dir", str(out), "--port", "0"],
        "chat_openai_api.py": [],
        "scripts/plot_log.py": ["--out_dir", str(out)],
        "scripts/merge_lora.py": ["--out_dir", str(out)],
        "scripts/estimate.py": ["--max_seq_len", "32", "--batch_size", "2"],
    }
    seen, server = set(), None
    for command in commands():
        program, script, *arguments = shlex.split(command)
        if program == "bash":
            assert command in ("bash scripts/quickstart.sh", "bash scripts/test.sh")
            continue
        seen.add(script)
        moved = [re.sub(r"^(dataset/|out/|my_|CORPUS|CONVERSATIONS)", rf"{tmp_path}/\1", word) for word in arguments]
        moved = [re.sub("^tiny$", "small", word).replace("_256", "_512") for word in moved]  # one chain serves all
        run = [sys.executable, str(REPO / script), *moved, *extra.get(script, [])]
        if script == "my_openai_api.py":
            server = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
            ready = next(line for line in server.stderr if "serving at" in line)
            extra["chat_openai_api.py"] = ["--api_base", re.search("http[^,]*", ready)[0]]
            continue
        typed = "你好\n" if script == "chat_openai_api.py" else ""
        done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, input=typed)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    server.terminate()
    assert server.wait(20) == 0
    assert {"data_process.py", "train_tokenizer.py", *extra} == seen
    assert (out / "full_sft_512.pth").exists() and (dataset / "sft_val.csv").exists()


def test_the_python_of_the_readme_runs(sft_weights):
    (code,) = re.findall(r"```python\n(.*?)```", ENGLISH.read_text(encoding="utf-8"), flags=re.DOTALL)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code.replace("out/full_sft_256.pth", str(sft_weights)), {})
    assert shown.getvalue()
