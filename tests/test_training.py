"""The training stages through their real main(): gradients, resuming, kills, bad input."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from stages import REPO, TINY, assert_same, command, flags, log_rows, pretrain, read_step, stage, weights

from model.checkpoint import atomic_write, find_weights, load_model, read_meta, remove_leftovers
from model.cli import one_line, overrides, run_main
from model.LMConfig import LMConfig
from model.model import Transformer
from model.optim import make_optimizer
from model.runtime import pick_device
from model.tokenizer import load_tokenizer

HALF_HEADS = ["--override", "dim=32", "n_layers=2", "n_heads=2", "n_kv_heads=1"]


# ------------------------------------------------------------------------------------------- one big batch


def test_micro_batches_and_ranks_give_the_gradient_of_one_big_batch(data_dir, tmp_path):
    """Rows hold unequal numbers of targets (the last one is padded), so a mean of means would differ."""
    sft = ["--max_steps", "3", "--learning_rate", "1e-2", "--optimizer", "adamw"]
    pretrain(data_dir, tmp_path / "base", "--max_steps", "1")
    init = ["--init_from", str(tmp_path / "base" / "pretrain_32.pth")]
    splits = {"big": (8, 1), "micro": (2, 4), "ranks": (2, 2)}
    for name, (batch, accumulation) in splits.items():
        split = ["--batch_size", str(batch), "--accumulation_steps", str(accumulation)]
        arguments = flags(data_dir, tmp_path / name, *sft, *init, *split, data="sft_data")
        if name == "ranks":
            torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                command("3-full_sft.py", *arguments, launcher=torchrun), capture_output=True, text=True, env=environment
            )
            assert done.returncode == 0, done.stderr
        else:
            assert stage("3-full_sft")(arguments) == 0
    big = weights(tmp_path / "big", "full_sft_32")
    for name in ("micro", "ranks"):
        assert_same(big, weights(tmp_path / name, "full_sft_32"), tolerance=2e-5)
        for row, reference in zip(
            log_rows(tmp_path / name, "full_sft_32"), log_rows(tmp_path / "big", "full_sft_32"), strict=True
        ):
            assert row["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    start = weights(tmp_path / "base")
    assert max((big[name] - start[name]).abs().max() for name in big) > 1e-3  # it did train


def test_moe_trains_with_its_balance_loss_and_logs_the_load(data_dir, tmp_path):
    moe = ["--override", "dim=32", "n_layers=2", "n_heads=4", "n_kv_heads=2", "use_moe=True"]
    arguments = flags(data_dir, tmp_path, *moe, "--max_steps", "4", "--batch_size", "4")
    assert stage("1-pretrain")(arguments) == 0
    rows = log_rows(tmp_path, "pretrain_32_moe")
    assert all(len(row["expert_load"]) == 4 and sum(row["expert_load"]) == pytest.approx(1, abs=1e-3) for row in rows)
    assert all(row["aux_loss"] >= 2 * 0.01 * 0.99 for row in rows)  # alpha a layer is the least there is
    router = weights(tmp_path, "pretrain_32_moe")["layers.0.feed_forward.gate.weight"]
    assert router.std() > 0


def test_both_stages_learn_and_report_held_out_figures(data_dir, tmp_path):
    assert pretrain(data_dir, tmp_path, "--epochs", "4", "--batch_size", "4", "--learning_rate", "1e-2") == 0
    rows = log_rows(tmp_path)
    assert rows[0]["loss"] == pytest.approx(8.76, abs=0.1)  # ln 6400
    assert rows[-1]["loss"] < 4
    first_row = json.loads((tmp_path / "pretrain_32.jsonl").read_text().splitlines()[0])
    assert first_row["type"] == "run" and first_row["args"]["batch_size"] == 4 and "torch" in first_row["versions"]
    meta = read_meta(tmp_path / "pretrain_32.pth")
    assert meta["finished"] and meta["step"] == meta["total_steps"] == len(rows)
    assert meta["val"]["loss"] < 4 and meta["val"]["bits_per_byte"] > 0

    sft = flags(
        data_dir, tmp_path, "--size", "tiny", "--init_from", "pretrain_32", "--batch_size", "4", data="sft_data"
    )
    sft[sft.index("--max_seq_len") + 1] = "96"
    assert stage("3-full_sft")([*sft, "--epochs", "4", "--learning_rate", "1e-2"]) == 0
    rows = log_rows(tmp_path, "full_sft_32")
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    configs = [read_meta(tmp_path / f"{name}.pth")["config"] for name in ("pretrain_32", "full_sft_32")]
    assert [config["max_seq_len"] for config in configs] == [64, 96]  # what generating may use
    state = weights(tmp_path, "full_sft_32")
    assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])


def test_held_out_bits_per_byte_are_the_loss_over_the_bytes(data_dir, tmp_path):
    assert pretrain(data_dir, tmp_path, "--max_steps", "2", "--batch_size", "4") == 0
    tokenizer = load_tokenizer()
    model, meta = load_model(tmp_path / "pretrain_32.pth", tokenizer=tokenizer)
    texts = (data_dir / "pretrain_val.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert meta["val"]["tokens"] == sum(len(tokenizer.encode(text)) + 1 for text in texts)  # and </s>
    num_bytes = sum(len(text.encode()) for text in texts)
    nats = meta["val"]["loss"] * meta["val"]["tokens"]
    assert meta["val"]["bits_per_byte"] == pytest.approx(nats / 0.6931472 / num_bytes, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizers_cover_every_parameter_once_and_learn(optimizer, data_dir, tmp_path):
    from model.optim import parameter_groups

    model = Transformer(LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, use_moe=True))
    groups = parameter_groups(model, 0.1, muon=optimizer == "muon")
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    assert all(p.dim() == 1 for group in groups if group["weight_decay"] == 0 for p in group["params"])
    extra = ["--optimizer", optimizer, "--epochs", "2", "--batch_size", "4", "--learning_rate", "5e-3"]
    assert pretrain(data_dir, tmp_path, *extra) == 0
    assert log_rows(tmp_path)[-1]["loss"] < 5.5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_with_overflowed_gradients_leaves_the_weights(optimizer):
    """As the first steps of float16 do, while the GradScaler looks for its scale."""
    model = Transformer(LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scaler = torch.amp.GradScaler("cpu")
    stepper = make_optimizer(model, optimizer, 1e-2, 0.1)
    scaler.scale(model(torch.arange(8)[None])[0].sum() * float("inf")).backward()
    scaler.unscale_(stepper)
    scaler.step(stepper)
    assert_same(before, model.state_dict())


@pytest.mark.parametrize("pair", ["width=3", "dim=3.5", "dim='x'", "n_layers=True"])
def test_an_override_that_is_no_setting_is_a_clear_error(pair):
    with pytest.raises(ValueError, match="width" if "width" in pair else "must be a whole number"):
        LMConfig.from_size("tiny", **overrides([pair]))


def test_muon_step_has_equal_singular_values():
    from model.optim import orthogonalize

    torch.manual_seed(0)
    for shape in ((16, 48), (48, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape) @ torch.diag(torch.logspace(-1, 1, shape[1]))))
        assert values.min() > 0.5 and values.max() < 1.3


def test_learning_rate_counts_optimizer_steps():
    from model.optim import cosine_lr

    rates = [cosine_lr(step, 100, 10, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1, abs=1e-3)
    assert cosine_lr(0, 1, 0, 3.0) == 3.0


@pytest.mark.parametrize("flag", ["--grad_checkpoint", "--compile"])
def test_flags_that_must_not_change_the_result(flag, data_dir, tmp_path):
    if flag == "--compile" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile on the CPU needs a C++ compiler")
    for name, more in (("plain", []), ("flag", [flag])):
        assert pretrain(data_dir, tmp_path / name, "--max_steps", "3", "--batch_size", "4", *more) == 0
    torch._dynamo.reset()
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "flag"), tolerance=1e-5)


# ----------------------------------------------------------------------------------------- stop and resume


def test_sigterm_saves_and_resume_is_bit_identical(data_dir, tmp_path):
    steps = ["--epochs", "2", "--batch_size", "2", "--override", *TINY[1:], "dropout=0.1"]
    whole = flags(data_dir, tmp_path / "whole", *steps)
    assert stage("1-pretrain")(whole) == 0
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        out = tmp_path / number.name
        process = start(flags(data_dir, out, *steps))
        wait_for_step(out, 3)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == expected, output
        meta = read_meta(out / "pretrain_32.pth")
        assert not meta["finished"] and meta["step"] >= 3
        assert stage("1-pretrain")([*flags(data_dir, out, *steps), "--resume"]) == 0
        assert_same(weights(tmp_path / "whole"), weights(out))
        assert [row["step"] for row in log_rows(out)] == [row["step"] for row in log_rows(tmp_path / "whole")]
        assert [row["loss"] for row in log_rows(out)] == [row["loss"] for row in log_rows(tmp_path / "whole")]


def test_a_signal_before_the_first_step_ends_at_once_and_overwrites_nothing(data_dir, tmp_path):
    """Tokenizing may take hours; nothing is worth saving then, least of all over the weights of another run."""
    data = tmp_path / "pretrain_data.csv"
    data.write_text("text\n" + "学而时习之不亦说乎\n" * 200_000, encoding="utf-8")
    process = start([*flags(tmp_path, tmp_path, *TINY, "--batch_size", "2"), "--val_path", ""])
    assert process.stdout.readline().startswith("device cpu")
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert [path.name for path in tmp_path.iterdir()] == ["pretrain_data.csv"], output


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command("1-pretrain.py", *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(out: Path, step: int, timeout: float = 60) -> None:
    """Waits until the log of a run holds the given step."""
    deadline = time.monotonic() + timeout
    log = out / "pretrain_32.jsonl"
    while time.monotonic() < deadline:
        if log.exists() and re.search(rf'"step": {step},', log.read_text()):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within {timeout} s")


@pytest.mark.parametrize("times", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_ends_bit_identical(data_dir, tmp_path, times):
    """SIGKILL at random moments, saves after every step: many kills fall into one."""
    steps = ["--epochs", str(1 + times // 4), "--batch_size", "2", "--save_interval", "1", *TINY]
    assert stage("1-pretrain")(flags(data_dir, tmp_path / "whole", *steps)) == 0
    out = tmp_path / "killed"
    arguments = [*flags(data_dir, out, *steps), "--resume"]
    rng, kills = random.Random(1), 0
    while kills < times:
        process = start(arguments)
        before = read_step(out)
        deadline = time.monotonic() + 60
        while read_step(out) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        assert process.poll() is None, "it ended before all kills: " + process.communicate()[0]
        process.kill()
        process.communicate()
        kills += 1
        if (out / "pretrain_32.pth").exists():
            assert read_meta(out / "pretrain_32.pth")["step"] > 0  # whatever was hit, weights and metadata agree
            load_model(out / "pretrain_32.pth")
    assert stage("1-pretrain")(arguments) == 0
    assert_same(weights(tmp_path / "whole"), weights(out))
    assert not list(out.glob(".*.tmp"))


def test_resume_with_other_data_or_batch_is_refused(data_dir, tmp_path):
    assert pretrain(data_dir, tmp_path, "--max_steps", "2", "--batch_size", "4") == 0
    before = (tmp_path / "pretrain_32.pth").read_bytes()
    with pytest.raises(ValueError, match="rows_per_step was 4, now it is 8"):
        pretrain(data_dir, tmp_path, "--max_steps", "4", "--batch_size", "8", "--resume")
    with pytest.raises(ValueError, match="seed was 1337, now it is 7"):
        pretrain(data_dir, tmp_path, "--max_steps", "4", "--batch_size", "4", "--resume", "--seed", "7")
    with pytest.raises(ValueError, match="model n_heads was 4, now it is 2"):  # the same shapes, another model
        pretrain(data_dir, tmp_path, "--max_steps", "4", "--batch_size", "4", "--resume", *HALF_HEADS)
    with pytest.raises(ValueError, match="cross_documents was False, now it is True"):
        pretrain(data_dir, tmp_path, "--max_steps", "4", "--batch_size", "4", "--resume", "--cross_documents")
    (tmp_path / "pretrain_32_resume.pth").write_bytes(before)
    with pytest.raises(ValueError, match="is no resume file"):
        pretrain(data_dir, tmp_path, "--max_steps", "4", "--batch_size", "4", "--resume")
    assert (tmp_path / "pretrain_32.pth").read_bytes() == before


def test_kill_between_the_two_renames_leaves_weights_with_their_own_metadata(data_dir, tmp_path):
    assert pretrain(data_dir, tmp_path, "--max_steps", "2", "--batch_size", "4") == 0
    path = tmp_path / "pretrain_32.pth"
    old = path.read_bytes()
    assert pretrain(data_dir, tmp_path, "--max_steps", "3", "--batch_size", "4", "--learning_rate", "1e-2") == 0
    assert read_meta(path)["step"] == 3
    path.write_bytes(old)  # as if the new weights had never been renamed into place
    assert read_meta(path)["step"] == 2


# ------------------------------------------------------------------------------------------------ bad input


def test_non_finite_loss_stops_and_keeps_the_last_save(data_dir, tmp_path):
    assert pretrain(data_dir, tmp_path, "--max_steps", "2", "--batch_size", "4") == 0
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}  # the log of these weights too
    model_state = weights(tmp_path)
    model_state["norm.weight"] = torch.full_like(model_state["norm.weight"], float("nan"))
    torch.save(model_state, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"loss nan.* at step 1, learning rate .*, epoch 1, rows 0 to 3"):
        pretrain(data_dir, tmp_path, "--max_steps", "9", "--batch_size", "4", "--init_from", str(tmp_path / "bad.pth"))
    assert {path: path.read_bytes() for path in files} == files


def run_script(script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(script, *arguments), capture_output=True, text=True, **options)


def test_full_disk_leaves_the_old_files_whole(data_dir, tmp_path):
    """A limit on file sizes stands for the full disk: the write fails with an OSError in the same place."""
    import resource

    assert pretrain(data_dir, tmp_path, "--max_steps", "2", "--batch_size", "4") == 0
    files = {path: path.read_bytes() for path in tmp_path.glob("*.pth")}
    arguments = flags(data_dir, tmp_path, *TINY, "--max_steps", "3", "--batch_size", "4")
    done = run_script(
        "1-pretrain.py",
        *arguments,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "pretrain_32" in errors[0] and "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pth")} == files
    assert not list(tmp_path.glob(".*.tmp"))


class Hostile:
    def __reduce__(self):
        return os.system, ("echo owned > owned.txt",)


def damaged_files(folder: Path) -> dict[str, Path]:
    """name -> a .pth that must be refused."""
    good = Transformer(LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2)).state_dict()
    names = "truncated hostile text empty pop short size partial".split()
    paths = {name: folder / f"{name}.pth" for name in names}
    torch.save(good, paths["truncated"])
    whole = paths["truncated"].read_bytes()
    paths["truncated"].write_bytes(whole[: len(whole) // 2])
    torch.save({"tok_embeddings.weight": Hostile()}, paths["hostile"])
    paths["text"].write_text("not a checkpoint")
    paths["empty"].write_bytes(b"")
    paths["pop"].write_bytes(b"\x80\x02.")  # pickles of an old torch.save, on which torch.load raises what
    paths["short"].write_bytes(b"\x80\x02X\x01")  # Python's list.pop and struct.unpack do
    other = Transformer(LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=500))
    torch.save(other.state_dict(), paths["size"])
    torch.save({name: value for name, value in good.items() if "layers.1.attention.wo" not in name}, paths["partial"])
    return paths


def test_damaged_and_hostile_weights_are_one_clear_line(data_dir, tmp_path):
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    for name, path in damaged_files(tmp_path).items():
        arguments = flags(data_dir, tmp_path, "--init_from", str(path), "--max_steps", "1", data="sft_data")
        with pytest.raises(ValueError) as error:
            os.chdir(cwd)
            try:
                stage("3-full_sft")(arguments)
            finally:
                os.chdir(REPO)
        assert name in one_line(error.value), (name, error.value)
    assert not (cwd / "owned.txt").exists()


def test_errors_are_one_line_with_exit_code_2(data_dir, tmp_path):
    missing = run_script("1-pretrain.py", "--data_path", str(tmp_path / "none.csv"), "--out_dir", str(tmp_path))
    assert missing.returncode == 2 and "Traceback" not in missing.stderr
    assert [line for line in missing.stderr.splitlines() if line.startswith("error:") and "none.csv" in line]
    no_weights = run_script("3-full_sft.py", "--out_dir", str(tmp_path / "nothing"), "--size", "tiny")
    assert no_weights.returncode == 2 and "1-pretrain.py" in no_weights.stderr and "Traceback" not in no_weights.stderr


def test_ranks_say_once_that_the_data_is_missing(tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    arguments = ["--data_path", str(tmp_path / "none.csv"), "--out_dir", str(tmp_path), *TINY]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command("1-pretrain.py", *arguments, launcher=torchrun), capture_output=True, text=True, env=environment
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "none.csv" in errors[0]
    assert '1-pretrain.py", line' not in done.stderr  # no traceback of ours


def test_running_out_of_memory_is_one_line_with_exit_code_2(capsys):
    def main():
        torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory (")


@pytest.mark.parametrize("name", ["xpu", "meta", "gpu", "cpu:x"])
def test_a_device_this_toolkit_does_not_run_on_is_refused(name):
    with pytest.raises(ValueError, match=f"device '{name}'"):
        pick_device(name)


def test_another_tokenizer_is_refused(data_dir, tmp_path):
    assert pretrain(data_dir, tmp_path, "--max_steps", "1", "--batch_size", "4") == 0
    tokenizer = load_tokenizer()
    tokenizer.fingerprint = "0" * 64
    with pytest.raises(ValueError, match="another tokenizer"):
        load_model(tmp_path / "pretrain_32.pth", tokenizer=tokenizer)


def test_changed_weights_are_refused_by_their_sha256(data_dir, tmp_path):
    assert pretrain(data_dir, tmp_path, "--max_steps", "1", "--batch_size", "4") == 0
    state = weights(tmp_path)
    state["norm.weight"][0] += 1
    torch.save(state, tmp_path / "pretrain_32.pth")
    with pytest.raises(ValueError, match="sha256 differs"):
        load_model(tmp_path / "pretrain_32.pth")


# ----------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("moe", [False, True])
def test_a_v1_file_without_metadata_loads_by_its_shapes(moe, tmp_path):
    config = LMConfig(dim=64, n_layers=3, n_heads=16, n_kv_heads=8, vocab_size=320, use_moe=moe)
    model = Transformer(config).eval()
    state = {"_orig_mod." + name: value for name, value in model.state_dict().items()}
    state["layers.0.attention.mask"] = torch.zeros(1, 1, 8, 8)
    torch.save(state, tmp_path / "v1.pth")
    loaded, meta = load_model(tmp_path / "v1.pth")
    assert meta == {} and loaded.config.n_layers == 3 and loaded.config.n_kv_heads == 8
    ids = torch.arange(40)[None]
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    with pytest.raises(ValueError, match="n_heads"):
        load_model(tmp_path / "v1.pth", n_heads=7)


def test_find_weights_lists_what_there_is(tmp_path):
    (tmp_path / "pretrain_512.pth").touch()
    assert find_weights("pretrain", tmp_path, "small") == tmp_path / "pretrain_512.pth"
    with pytest.raises(ValueError, match=r"there are: pretrain_512\.pth"):
        find_weights("full_sft", tmp_path, "small")


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid(), os.getppid()):
        (tmp_path / f".pretrain_32.pth.{pid}.tmp").touch()
    remove_leftovers(tmp_path, "pretrain_32")
    assert {path.name.split(".")[3] for path in tmp_path.iterdir()} == {str(os.getpid()), str(os.getppid())}


def test_atomic_write_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path, "w") as file:
        file.write("new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_wandb_offline_records_and_no_wandb_does_not_stop_the_run(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    more = ["--max_steps", "2", "--batch_size", "4", "--use_wandb", "--wandb_project", "test"]
    assert pretrain(data_dir, tmp_path, *more) == 0
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert pretrain(data_dir, tmp_path / "without", *more) == 0


def test_what_the_weights_fix_cannot_be_overridden(data_dir, tmp_path):
    with pytest.raises(ValueError, match="vocab_size=100 was asked for, but it is 6400"):
        pretrain(data_dir, tmp_path, "--max_steps", "1", "--override", "dim=32", "n_heads=8", "vocab_size=100")
    assert pretrain(data_dir, tmp_path, "--max_steps", "1", "--batch_size", "4") == 0
    with pytest.raises(ValueError, match="n_layers=3 was asked for, but it is 2"):
        pretrain(data_dir, tmp_path, "--init_from", "pretrain_32", "--override", "n_layers=3")


def test_held_out_data_is_looked_for_beside_the_training_data(data_dir):
    from argparse import Namespace

    from model.cli import resolve_val_path

    def found(name, val_path=None):
        return resolve_val_path(Namespace(data_path=str(data_dir / name), val_path=val_path))

    assert found("pretrain_data.csv") == str(data_dir / "pretrain_val.csv")
    assert found("other.csv") is None and found("pretrain_data.csv", "") is None and found("x", "own.csv") == "own.csv"
