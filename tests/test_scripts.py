"""The tools in scripts/: quickstart.sh, report.py, plot_log.py, benchmark.py."""

import importlib.util
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.checkpoint import save_weights
from model.dataset import read_records
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import load_tokenizer

REPO = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------- quickstart.sh and test.sh

# Stands for a training script: writes what those write, and does what the file `behaviour` beside it says.
STAGE = """
import json, os, pathlib, sys, time
name, out, suffix = {name!r}, sys.argv[sys.argv.index("--out_dir") + 1], "256"
behaviour = pathlib.Path("behaviour").read_text() if os.path.exists("behaviour") else ""
print(name, "resumes" if "--resume" in sys.argv else "starts", flush=True)
if behaviour == name + " is interrupted":
    open(f"{{out}}/{{name}}_{{suffix}}_resume.pth", "w").close()
    print("SIGINT: saving", file=sys.stderr)
    sys.exit(130)
if behaviour == name + " fails":
    print("error: disk full", file=sys.stderr)
    sys.exit(2)
json.dump({{"finished": True, "random": os.urandom(8).hex()}}, open(f"{{out}}/{{name}}_{{suffix}}.json", "w"))
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder like a clone with an installed environment and demo data, its training scripts replaced by STAGE."""
    for name in ("scripts", "model", "dataset", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("quickstart.sh", "test.sh", "venv.sh", "run_logged.py"):
        shutil.copy(REPO / "scripts" / name, tmp_path / "scripts")
    for path in REPO.glob("requirements*.txt"):
        shutil.copy(path, tmp_path)
        shutil.copy(path, tmp_path / ".venv" / f"installed-{path.name}")
    shutil.copy(REPO / "model/LMConfig.py", tmp_path / "model")
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "dataset/pretrain_data.csv").write_text("text\n你好\n")
    (tmp_path / "dataset/sft_data.csv").write_text("history,q,a\n[],你好,你好\n")
    stages = {"1-pretrain.py": "pretrain", "3-full_sft.py": "full_sft", "scripts/report.py": "report"}
    for script, name in stages.items():
        (tmp_path / script).write_text(STAGE.format(name=name))
    return tmp_path


def quickstart(clone: Path, behaviour: str = "", *args: str) -> subprocess.CompletedProcess:
    (clone / "behaviour").write_text(behaviour)
    command = ["bash", str(clone / "scripts/quickstart.sh"), "--size", "tiny", *args]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)


def steps(done: subprocess.CompletedProcess) -> list[str]:
    """What the stages said of themselves, as in ["pretrain starts"]."""
    return [line for line in done.stdout.splitlines() if line.endswith((" starts", " resumes"))]


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "venv.sh"])
def test_shell_scripts_parse_and_need_no_new_bash(script):
    text = (REPO / "scripts" / script).read_text()
    subprocess.run(["bash", "-n", REPO / "scripts" / script], check=True)
    for newer_than_macos in ("declare -A", "mapfile", "readarray", "|&", "&>>", ",,}", "^^}", "wait -n"):
        assert newer_than_macos not in text


def test_quickstart_goes_through_and_skips_what_is_finished(clone):
    done = quickstart(clone)
    assert done.returncode == 0, done.stderr
    assert steps(done) == ["pretrain starts", "full_sft starts", "report starts"]
    assert ".venv/bin/python 2-eval.py --size tiny" in done.stdout
    assert (clone / "out/quickstart/pretrain_tiny.log").read_text() == "pretrain starts\n"

    again = quickstart(clone)
    assert again.returncode == 0
    assert steps(again) == ["report starts"]  # from its log, to show the figures
    assert again.stdout.count("finished before") == 3

    with open(clone / "dataset/sft_data.csv", "a") as file:
        file.write("[],再见,再见\n")
    assert steps(quickstart(clone)) == ["full_sft starts", "report starts"]
    (clone / "out/pretrain_256.json").write_text('{"finished": true}')  # trained by hand since
    assert steps(quickstart(clone)) == ["pretrain starts", "full_sft starts", "report starts"]


def test_quickstart_fast_keeps_apart_from_the_full_run(clone):
    quickstart(clone, "", "--fast")
    assert (clone / "out/fast/full_sft_256.json").exists()
    assert not (clone / "out/full_sft_256.json").exists()
    assert steps(quickstart(clone))[0] == "pretrain starts"


def test_quickstart_continues_what_was_interrupted(clone):
    done = quickstart(clone, "full_sft is interrupted")
    assert done.returncode == 130
    assert "To continue: bash scripts/quickstart.sh --size tiny" in done.stderr
    done = quickstart(clone)
    assert done.returncode == 0
    assert steps(done) == ["full_sft resumes", "report starts"]

    quickstart(clone, "full_sft is interrupted")
    (clone / "dataset/sft_data.csv").write_text("history,q,a\n[],早,早\n")
    assert steps(quickstart(clone))[0] == "full_sft starts"  # other data: its resume file is of no use


def test_quickstart_names_the_step_that_failed(clone):
    done = quickstart(clone, "pretrain fails")
    assert done.returncode == 1
    assert "Step pretrain_tiny failed (exit code 2)" in done.stderr
    assert "out/quickstart/pretrain_tiny.log" in done.stderr
    assert "The command was: .venv/bin/python 1-pretrain.py --size tiny" in done.stderr
    assert "To continue:     bash scripts/quickstart.sh --size tiny" in done.stderr
    assert "error: disk full" in (clone / "out/quickstart/pretrain_tiny.log").read_text()
    assert steps(done) == ["pretrain starts"]


def test_quickstart_shows_and_logs_the_error_of_a_real_step(clone):
    shutil.copy(REPO / "1-pretrain.py", clone)
    shutil.copytree(REPO / "model", clone / "model", dirs_exist_ok=True)
    (clone / "dataset/pretrain_data.csv").write_text("content\n你好\n")
    done = quickstart(clone)
    assert done.returncode == 1
    assert "Step pretrain_tiny failed (exit code 2)" in done.stderr
    log = (clone / "out/quickstart/pretrain_tiny.log").read_text()
    assert "error: " in log and "pretrain_data.csv" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("args", [["--size", "huge"], ["--size"], ["--quick"]])
def test_quickstart_refuses_wrong_arguments(clone, args):
    done = subprocess.run(["bash", clone / "scripts/quickstart.sh", *args], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_too_old_python_is_named(clone, tmp_path):
    (clone / ".venv/bin/python").unlink()
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "cmp", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.6\nexit 1\n')
    (tools / "python3").chmod(0o755)
    command = [shutil.which("bash"), clone / "scripts/quickstart.sh"]
    done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed; python3 is Python 3.9.6" in done.stderr


# ---------------------------------------------------------------- run_logged.py


def test_run_logged_keeps_the_last_state_of_a_line(tmp_path):
    log = tmp_path / "log"
    code = "import sys; sys.stderr.write('\\r10%\\r\\r20%\\n'); print('text'); sys.stdout.write('end'); sys.exit(3)"
    command = [sys.executable, REPO / "scripts/run_logged.py", log, sys.executable, "-u", "-c", code]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 3
    assert log.read_text() == "20%\ntext\nend\n"
    assert done.stdout == b"\r10%\r\r20%\ntext\nend"


def test_run_logged_gives_the_command_a_terminal(tmp_path):
    log = tmp_path / "log"
    code = "import os, sys; print(sys.stderr.isatty(), os.get_terminal_size(2).columns)"
    reader, writer = pty.openpty()
    command = [sys.executable, REPO / "scripts/run_logged.py", log, sys.executable, "-c", code]
    command = ["bash", "-c", 'stty cols 77; exec "$@"', "-", *command]
    subprocess.run(command, stdin=writer, stdout=writer, check=True)
    os.close(writer)
    assert b"True 77" in os.read(reader, 1000)
    os.close(reader)
    assert log.read_text() == "True 77\n"


def test_run_logged_waits_for_a_command_that_saves_on_ctrl_c(tmp_path):
    log = tmp_path / "log"
    code = (
        "import signal, sys, time\n"
        "def save(*_): time.sleep(0.5); print('saved', flush=True); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save); print('ready', flush=True); time.sleep(30)"
    )
    command = [sys.executable, REPO / "scripts/run_logged.py", log, sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout.readline() == b"ready\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 130
    assert log.read_text() == "ready\nsaved\n"


# ---------------------------------------------------------------- plot_log.py


def script(name: str):
    """The module scripts/{name}.py."""
    spec = importlib.util.spec_from_file_location(name, REPO / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_log(path: Path, num_steps: int, tail: str = "") -> None:
    records = [{"type": "run", "step": 0}]
    for step in range(1, num_steps + 1):
        records += [{"type": "step", "step": step, "loss": 8 / step, "lr": 1e-3, "tokens_per_second": 5000.0}]
    records += [{"type": "val", "step": num_steps, "loss": 2.5}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


def test_plot_log_draws_runs_by_name_and_path_although_one_is_being_written(tmp_path):
    main, run, other = script("plot_log").main, tmp_path / "pretrain_256", str(tmp_path / "full_sft_256.jsonl")

    def image(*args: str) -> bytes:
        main([*args, "--out_dir", str(tmp_path)])
        return run.with_suffix(".png").read_bytes()

    write_log(tmp_path / "full_sft_256.jsonl", 3)
    write_log(run.with_suffix(".jsonl"), 50)
    both = image("pretrain_256", other)
    assert both.startswith(b"\x89PNG")
    assert image("pretrain_256") != both
    write_log(run.with_suffix(".jsonl"), 50, tail='{"type": "step", "step": 51, "lo')
    assert image("pretrain_256", other) == both
    write_log(run.with_suffix(".jsonl"), 51)
    assert image("pretrain_256", other) != both


def test_plot_log_says_what_is_wrong(tmp_path):
    write_log(tmp_path / "pretrain_256.jsonl", 2)
    (tmp_path / "empty.jsonl").write_text('{"type": "run", "step": 0}\n')
    for args, message in (
        (["pretrain_512"], "pretrain_256"),  # which there is
        (["empty"], "no training steps"),
        (["pretrain_256", "--output", "a.doc"], ".png"),
    ):
        with pytest.raises(ValueError, match=message):
            script("plot_log").main([*args, "--out_dir", str(tmp_path)])


# ---------------------------------------------------------------- report.py


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("一样", "一样", 1.0),
        ("比喻", "形容", 0.0),
        ("比喻两件事", "比喻两件小事。", 2 * 1.0 * (5 / 6) / (1.0 + 5 / 6)),  # P 5/5, R 5/6
        ("好好好好", "好", 2 * (1 / 4) * 1.0 / (1 / 4 + 1.0)),  # a repeated character counts once: P 1/4, R 1/1
        ("P. Diddy", "p diddy!", 1.0),  # case, spaces and punctuation do not count
        ("。。。", "，，，是", 0.0),
        ("…", "！", 1.0),  # nothing in either
        ("", "是", 0.0),
    ],
)
def test_character_f1(answer, reference, f1):
    assert script("report").character_f1(answer, reference) == pytest.approx(f1)
    assert script("report").character_f1(reference, answer) == pytest.approx(f1)


def conversation(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def test_report_scores_the_last_answer_given_the_turns_before():
    asked = []

    def answerer(conversations):
        asked.extend(conversations)
        return [("甲", True), ("甲乙", True), ("", False)]

    conversations = [conversation("一", "甲"), conversation("一", "甲", "二", "乙丙"), conversation("三", "丁")]
    result = script("report").score(answerer, conversations)
    assert asked == [c[:-1] for c in conversations]
    assert result["questions"] == 3
    assert result["mean_f1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert result["share_f1_half"] == pytest.approx(2 / 3)
    assert result["share_ended"] == pytest.approx(2 / 3)
    assert result["answers"][1] == {"question": "二", "reference": "乙丙", "answer": "甲乙", "f1": 0.5}


def test_report_prints_figures_and_six_conversations(tmp_path, monkeypatch, capsys):
    report = script("report")
    tokenizer = load_tokenizer()
    model = Transformer(LMConfig.from_size("tiny", vocab_size=tokenizer.vocab_size))
    val = {"step": 9, "loss": 3.0, "perplexity": 20.0855, "bits_per_byte": 1.25, "tokens": 1000}
    for stage, figures in (("pretrain", val), ("full_sft", {})):
        meta = {"config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint, "val": figures}
        save_weights(tmp_path / f"{stage}_256.pth", model.state_dict(), meta)
    rows = ["[],什么？,回答", '"[[""甲"", ""乙""]]",然后呢？,回答', "[],What is it?,It"]
    for name in ("sft_data.csv", "sft_val.csv"):
        (tmp_path / name).write_text("history,q,a\n" + "\n".join(rows))
    (tmp_path / "sft_val_new.csv").write_text("history,q,a\n[],新的？,回答\n")

    monkeypatch.setattr(report, "MAX_NEW_TOKENS", 3)
    where = ["--out_dir", str(tmp_path), "--data_dir", str(tmp_path)]
    report.main(["--size", "tiny", "--questions", "2", "--device", "cpu", *where])
    written = json.loads((tmp_path / "report_256.json").read_text())
    assert written["held_out"] == {"pretrain": val, "full_sft": {}}
    assert {name: r["questions"] for name, r in written["answers"].items()} == {
        "sft_data.csv": 2, "sft_val.csv": 2, "sft_val_new.csv": 1
    }
    questions = [[m["content"] for m in s["messages"] if m["role"] == "user"] for s in written["samples"]]
    assert questions[0][0] == "你是谁？" and len(questions) == 6
    assert ["甲", "然后呢？"] in questions and ["What is it?"] in questions and ["新的？"] in questions
    printed = capsys.readouterr().out
    assert "20.09" in printed and "1.2500" in printed and "not measured" in printed
    assert printed.count("Q: 你是谁？") == 1


# ---------------------------------------------------------------- benchmark.py

# Stands for a checkout of v1: its package has the name of ours, its Transformer returns a loss for every token.
V1_FILES = {
    "LMConfig.py": "class LMConfig:\n    def __init__(self, **numbers): vars(self).update(numbers)\n",
    "model.py": """
import types, torch
from .LMConfig import LMConfig
class Transformer(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(6400, 8)
    def forward(self, ids, targets):
        assert ids.shape == (2, 15)  # one short of a row, as v1 shifts it
        return types.SimpleNamespace(last_loss=self.table(ids).square().mean(-1).flatten())
""",
}


def benchmark(tmp_path: Path, *args) -> tuple[dict, str]:
    command = [sys.executable, REPO / "scripts/benchmark.py", *map(str, args), "--json", tmp_path / "figures.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "figures.json").read_text()), done.stdout


def test_benchmark_train_measures_all_three_in_turns(tmp_path):
    (tmp_path / "v1/model").mkdir(parents=True)
    for name, text in V1_FILES.items():
        (tmp_path / "v1/model" / name).write_text(text)
    (tmp_path / "data.csv").write_text("text\nab\ncdef\n")
    smallest = ["--size", "tiny", "--rounds", 2, "--device", "cpu", "--dtype", "float32"]
    row = ["--batch_size", 2, "--max_seq_len", 16, "--steps", 1]
    paths = ["--v1", tmp_path / "v1", "--data_path", tmp_path / "data.csv"]
    figures, printed = benchmark(tmp_path, "train", *smallest, *row, *paths)
    assert list(figures["results"]) == ["ours", "transformers", "v1"]
    for name, result in figures["results"].items():
        assert len(result["rounds"]) == 2
        assert result["min"] <= result["median"] <= result["max"]
        assert result["mfu"] > 0 and result["memory_gib"] > 0 and result["dtype"] == "float32"
        assert name in printed
    assert set(figures["ratios"]) == {"transformers", "v1", "v1, real tokens"}
    tokenizer = load_tokenizer()
    lengths = [len(tokenizer.encode_document(text)) for text in ("ab", "cdef")]
    # packed: one row holds both; padded: a row each, one token short
    assert figures["results"]["ours"]["real_share"] == pytest.approx((sum(lengths) - 2) / 16)
    assert figures["results"]["v1"]["real_share"] == pytest.approx((sum(lengths) - 2) / 30)


def test_benchmark_decode_gives_everyone_the_same_weights(tmp_path):
    smallest = ["--size", "tiny", "--rounds", 2, "--device", "cpu", "--dtypes", "float32", "--batch_sizes", 1, 2]
    figures, printed = benchmark(tmp_path, "decode", *smallest, "--new_tokens", 4, "--prompt_tokens", 5)
    assert [(case["dtype"], case["batch_size"]) for case in figures["cases"]] == [("float32", 1), ("float32", 2)]
    for case in figures["cases"]:
        assert list(case["results"]) == ["ours", "transformers"]
        assert all(len(result["rounds"]) == 2 for result in case["results"].values())
        assert case["same_tokens"] == 1.0
        assert case["ratios"]["transformers"] > 0
    assert "ours / transformers" in printed


def test_the_llama_that_is_measured_computes_what_our_model_does(tiny_model):
    model = tiny_model()
    llama = script("benchmark").as_llama(model)
    ids = torch.randint(3, 48, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, model(ids)[0], atol=1e-5, rtol=1e-5)


def test_benchmark_memory_writes_files_of_the_asked_size(tmp_path):
    (tmp_path / "small.csv").write_text('text\n"一, 二\n三"\n四\n')
    script("benchmark").write_corpus(tmp_path / "large.csv", tmp_path / "small.csv", 5000)
    assert 5000 <= (tmp_path / "large.csv").stat().st_size < 5100
    texts = [record["text"] for _, record in read_records(tmp_path / "large.csv", pytest.fail)]
    assert texts[0].endswith("一, 二\n三") and texts[1].endswith("四")
    assert len(set(texts)) == len(texts)  # a cache of equal texts would hide the cost
