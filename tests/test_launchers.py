"""The four training stages under torchrun, FSDP and DeepSpeed: two gloo processes agree with one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from stages import REPO, TINY, assert_same, command, flags, log_rows, read_step, stage, weights

from model.dataset import SFTData
from model.LMConfig import LMConfig
from model.model import Transformer
from model.parallel import deepspeed_config
from model.runtime import Plan, device_of_rank
from model.tokenizer import load_tokenizer

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
TWO = (*TORCHRUN, "--standalone", "--nproc_per_node", "2")
WAYS = {"ddp": [], "fsdp": ["--fsdp"], "zero1": ["--deepspeed", "zero1"], "zero2": ["--deepspeed"]}
WAYS["zero3"] = ["--deepspeed", "zero3"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def needs_deepspeed(way: str) -> None:
    if way.startswith("zero"):
        pytest.importorskip("deepspeed")


def launch(script: str, arguments: list[str], launcher: tuple[str, ...] = TWO) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(script, *arguments, launcher=launcher), capture_output=True, text=True, env=ENVIRONMENT, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


# -------------------------------------------------------------------------------------------- the same result


def losses(out: Path, name: str) -> list[float]:
    return [row["loss"] for row in log_rows(out, name)]


def assert_same_losses(found: list[float], expected: list[float]) -> None:
    assert len(found) == len(expected)
    assert found == pytest.approx(expected, rel=1e-4)


MOE = ["--override", "dim=32", "n_layers=2", "n_heads=4", "n_kv_heads=2", "use_moe=True"]


@pytest.mark.parametrize("way", ["fsdp", "zero2"])
def test_a_sharded_run_has_the_losses_and_weights_of_one_process(way, data_dir, tmp_path):
    """A mixture of experts with dropout off; the file that is written loads as any other."""
    needs_deepspeed(way)
    arguments = ["--max_steps", "4", "--learning_rate", "1e-2", "--accumulation_steps", "2", *MOE]
    assert stage("1-pretrain")(flags(data_dir, tmp_path / "one", *arguments, "--batch_size", "4")) == 0
    launch("1-pretrain.py", flags(data_dir, tmp_path / way, *arguments, "--batch_size", "2", *WAYS[way]))
    name = "pretrain_32_moe"
    assert_same_losses(losses(tmp_path / way, name), losses(tmp_path / "one", name))
    assert_same(weights(tmp_path / way, name), weights(tmp_path / "one", name), tolerance=1e-4)
    held_out = [log_rows(tmp_path / out, name, "val")[-1]["loss"] for out in (way, "one")]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)


@pytest.mark.slow
def test_fsdp_computes_in_bfloat16_what_one_process_does(data_dir, tmp_path):
    """Norms and router stay float32, as autocast leaves them: rounded, they would move the loss by more."""
    arguments = ["--max_steps", "3", "--learning_rate", "1e-2", *MOE, "--dtype", "bfloat16"]
    for out, batch_size, launcher in (("one", "4", (sys.executable,)), ("fsdp", "2", TWO)):
        more = WAYS["fsdp"] if out == "fsdp" else []
        launch(
            "1-pretrain.py", [*flags(data_dir, tmp_path / out), *arguments, "--batch_size", batch_size, *more], launcher
        )
    one, fsdp = (losses(tmp_path / out, "pretrain_32_moe") for out in ("one", "fsdp"))
    assert fsdp == pytest.approx(one, rel=2e-4)


STAGES = {  # script: what it reads, what it writes, more flags; 20 steps of each
    "1-pretrain": ("pretrain_data.csv", "pretrain_32", []),
    "3-full_sft": ("sft_data.csv", "full_sft_32", ["--init_from", "START/pretrain_32.pth"]),
    "4-lora_sft": ("sft_data.csv", "lora_x_32", ["--init_from", "START/full_sft_32.pth", "--lora_name", "x"]),
    "5-dpo_train": ("dpo/train_data.json", "rl_32", ["--init_from", "START/full_sft_32.pth"]),
}


def stage_flags(script: str, data_dir: Path, start: Path, out: Path, batch_size: int, moe: bool) -> list[str]:
    data, _, more = STAGES[script]
    data_path = data_dir / data
    arguments = ["--data_path", str(data_path), "--out_dir", str(out), "--batch_size", str(batch_size), "--seed", "5"]
    arguments += ["--max_seq_len", "64", "--device", "cpu", "--dtype", "float32", "--log_interval", "1"]
    arguments += ["--max_steps", "20", "--accumulation_steps", "2", "--learning_rate", "3e-3"]
    arguments += [word.replace("START", str(start)) for word in more]
    if moe:
        arguments = [re.sub(r"_32\.pth$", "_32_moe.pth", word) for word in arguments]
    if script == "1-pretrain":
        arguments += MOE if moe else TINY
    if script == "4-lora_sft":
        arguments += ["--replay_path", str(data_path), "--general_path", str(data_dir / "sft_val.csv")]
    if script == "5-dpo_train":
        arguments += ["--general_path", str(data_dir / "sft_val.csv")]
    return arguments


@pytest.fixture(scope="session")
def one_process(data_dir, tmp_path_factory):
    """one_process(moe): the folder with 20 steps of each stage by one process."""
    made = {}

    def make(moe: bool) -> Path:
        if moe not in made:
            made[moe] = tmp_path_factory.mktemp("one")
            for script in STAGES:
                assert stage(script)(stage_flags(script, data_dir, made[moe], made[moe], 4, moe)) == 0
        return made[moe]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("script", STAGES)
@pytest.mark.parametrize("way", ["ddp", "fsdp", "zero2", "zero3"])
def test_twenty_steps_of_every_stage_agree_under_every_launcher(way, script, moe, data_dir, one_process, tmp_path):
    needs_deepspeed(way)
    one, name = one_process(moe), STAGES[script][1] + "_moe" * moe
    launch(f"{script}.py", [*stage_flags(script, data_dir, one, tmp_path, 2, moe), *WAYS[way]])
    assert len(losses(one, name)) == 20
    assert_same_losses(losses(tmp_path, name), losses(one, name))
    assert weights(tmp_path, name).keys() == weights(one, name).keys()


def test_every_row_is_used_once_an_epoch_whatever_the_number_of_ranks(data_dir):
    data = SFTData(data_dir / "sft_data.csv", load_tokenizer(), 64)
    model = Transformer(LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2))
    every = [tuple(row.tolist()) for row in data.rows(0, 0, data.num_rows).input_ids]
    for ranks, batch_size, accumulation in ((1, 3, 1), (2, 2, 3), (3, 4, 2)):
        seen = []
        for rank in range(ranks):
            run = Namespace(rank=rank, world_size=ranks, device=torch.device("cpu"), print=lambda *text: None)
            run.dtype, run.backend = torch.float32, "ddp"
            args = dict(batch_size=batch_size, accumulation_steps=accumulation, epochs=1, max_steps=0, warmup_steps=0)
            args |= dict(max_seq_len=64, optimizer="adamw", grad_checkpoint=False)
            plan = Plan(data, Namespace(**args), run, model)
            for step in range(plan.total_steps):
                seen += [tuple(r.tolist()) for b in plan.batches(step) for r in b.input_ids[b.documents[:, 0] > 0]]
        assert sorted(seen) == sorted(every)


def test_ranks_hold_half_and_reduce_gradients_once_a_step(tmp_path):
    """Measured bytes of weights and optimizer state, and counted reductions, with 1 and 4 micro-batches."""
    pytest.importorskip("deepspeed")
    probe = str(REPO / "tests" / "parallel_probe.py")
    done = subprocess.run([*TWO, probe, str(tmp_path)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        whole = found["ddp"]
        assert whole["optimizer"] == 2 * whole["weights"]  # AdamW's two moments
        for way, weights_share, optimizer_share in (("fsdp", 2, 2), ("zero1", 1, 2), ("zero2", 1, 2), ("zero3", 2, 2)):
            assert found[way]["weights"] * weights_share == pytest.approx(whole["weights"], rel=0.01), way
            assert found[way]["optimizer"] * optimizer_share == pytest.approx(whole["optimizer"], rel=0.01), way
        for way in ("ddp", "fsdp", "zero1"):
            assert found[way]["reductions"]["4"] == found[way]["reductions"]["1"] > 0, way
        for way in ("zero2", "zero3"):  # what is sharded between micro-batches must be reduced in each
            assert found[way]["reductions"]["4"] == 4 * found[way]["reductions"]["1"], way


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_agents_on_one_machine_are_two_nodes(data_dir, tmp_path):
    arguments = ["--max_steps", "3", *TINY]
    assert stage("1-pretrain")(flags(data_dir, tmp_path / "one", *arguments, "--batch_size", "4")) == 0
    port, agents = free_port(), []
    for node in ("0", "1"):
        launcher = (*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", node)
        launcher += ("--master_addr", "127.0.0.1", "--master_port", port)
        run = command(
            "1-pretrain.py", *flags(data_dir, tmp_path / "two", *arguments, "--batch_size", "2"), launcher=launcher
        )
        agents.append(
            subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
        )
    for agent in agents:
        output = agent.communicate(timeout=300)[0]
        assert agent.returncode == 0, output[-3000:]
    assert_same_losses(losses(tmp_path / "two", "pretrain_32"), losses(tmp_path / "one", "pretrain_32"))


@pytest.mark.slow
def test_the_deepspeed_launcher_shards_without_a_flag(data_dir, tmp_path):
    pytest.importorskip("deepspeed")
    arguments = ["--max_steps", "3", *TINY]
    assert stage("1-pretrain")(flags(data_dir, tmp_path / "one", *arguments, "--batch_size", "4")) == 0
    launcher = (sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port())
    done = launch("1-pretrain.py", flags(data_dir, tmp_path / "two", *arguments, "--batch_size", "2"), launcher)
    assert "2 process(es), deepspeed" in done.stdout
    assert_same_losses(losses(tmp_path / "two", "pretrain_32"), losses(tmp_path / "one", "pretrain_32"))


# -------------------------------------------------------------------------------------------- stop and resume


def half_and_whole(data_dir: Path, out: Path, batch_size: str, *more: str) -> list[str]:
    return flags(data_dir, out, "--batch_size", batch_size, "--warmup_steps", "1", *TINY, *more)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_resume_under_another_launcher_and_number_of_ranks(way, data_dir, tmp_path):
    """Saved by two ranks and resumed by one, saved by one and resumed by two: where one process alone arrives."""
    needs_deepspeed(way)

    def one(out: str, steps: str, *more: str) -> None:
        assert stage("1-pretrain")(half_and_whole(data_dir, tmp_path / out, "4", "--max_steps", steps, *more)) == 0

    def two(out: str, steps: str, *more: str) -> None:
        arguments = half_and_whole(data_dir, tmp_path / out, "2", "--max_steps", steps, *WAYS[way], *more)
        launch("1-pretrain.py", arguments)

    one("one", "3"), one("one", "6", "--resume")
    two("two_one", "3"), one("two_one", "6", "--resume")
    one("one_two", "3"), two("one_two", "6", "--resume")
    for name in ("two_one", "one_two"):
        assert_same(weights(tmp_path / name), weights(tmp_path / "one"), tolerance=2e-6)
        states = [
            torch.load(tmp_path / out / "pretrain_32_resume.pth", weights_only=True)["optimizer"]["state"]
            for out in (name, "one")
        ]
        for index, values in states[1].items():
            assert states[0][index]["step"] == values["step"] == 6
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(states[0][index][key], values[key], rtol=1e-3, atol=2e-5)


def worker_pids(agent: int) -> list[int]:
    """The processes that torchrun started, by rank."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rsplit(")", 1)[1].split()[1]) == agent:
                environment = (status.parent / "environ").read_bytes().split(b"\0")
                ranks = [int(word[5:]) for word in environment if word.startswith(b"RANK=")]
                found += [(rank, int(status.parent.name)) for rank in ranks]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return [pid for _, pid in sorted(found)]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found through /proc")
@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others_soon_and_resume_continues(way, data_dir, tmp_path):
    steps = ["--max_steps", "40", "--batch_size", "2", "--save_interval", "1", *TINY, *WAYS[way]]
    launch("1-pretrain.py", flags(data_dir, tmp_path / "whole", *steps))
    arguments = flags(data_dir, tmp_path / "killed", *steps)
    agent = subprocess.Popen(
        command("1-pretrain.py", *arguments, launcher=TWO),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 120
    while read_step(tmp_path / "killed") < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(worker_pids(agent.pid)[1], signal.SIGKILL)
    output = agent.communicate(timeout=60)[0]
    assert agent.returncode != 0
    assert any("rank 0: another process of this run has ended" in line for line in errors(output)), output[-3000:]
    assert '1-pretrain.py", line' not in output  # no traceback of ours
    done = launch("1-pretrain.py", [*arguments, "--resume"])
    assert re.search(r"resuming .* after step \d+ of", done.stdout)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


@pytest.mark.slow
def test_a_rank_that_fails_alone_says_so(data_dir, tmp_path):
    """Rank 1 cannot read the data that rank 0 reads: the message must be its own."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(REPO)!r})\nfrom model.cli import run_main\n"
        "def main():\n    if os.environ['RANK'] == '1':\n        raise ValueError('only mine')\n    time.sleep(60)\n"
        "run_main(main)\n"
    )
    done = subprocess.run([*TWO, str(probe)], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert errors(done.stderr) == ["error: rank 1: only mine"]


def test_resume_names_the_batch_that_other_ranks_need(data_dir, tmp_path):
    assert stage("1-pretrain")(flags(data_dir, tmp_path, *TINY, "--max_steps", "2", "--batch_size", "4")) == 0
    with pytest.raises(ValueError, match=r"--batch_size x --accumulation_steps x 1 process\(es\) must be 4"):
        stage("1-pretrain")(flags(data_dir, tmp_path, *TINY, "--max_steps", "4", "--batch_size", "2", "--resume"))


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "more, message",
    [
        (["--fsdp"], "--fsdp needs a launcher"),
        (["--deepspeed"], "--deepspeed needs a launcher"),
        (["--fsdp", "--deepspeed"], "exclude each other"),
        (["--cpu_offload"], "goes with --fsdp on a GPU"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(more, message, data_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        stage("1-pretrain")(flags(data_dir, tmp_path, *TINY, *more))


def run_as_rank(variables: dict[str, str], arguments: list[str], before: str = "") -> list[str]:
    """The error lines of a stage started by hand with these variables of a launcher."""
    code = f"{before}\nimport sys, runpy\nsys.argv = {['1-pretrain.py', *arguments]!r}\n"
    code += f"sys.path.insert(0, {str(REPO)!r})\nrunpy.run_path({str(REPO / '1-pretrain.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT | variables, timeout=120
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return errors(done.stderr)


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def test_a_port_in_use_is_one_line(data_dir, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        found = run_as_rank(LAUNCHED | {"WORLD_SIZE": "2", "MASTER_PORT": port}, flags(data_dir, tmp_path, *TINY))
    assert len(found) == 1 and f"127.0.0.1:{port}" in found[0] and "--master_port" in found[0]


def test_a_launcher_that_says_too_little_is_one_line(data_dir, tmp_path):
    found = run_as_rank({"RANK": "0"}, flags(data_dir, tmp_path, *TINY))
    assert found == ["error: RANK is set in the environment but WORLD_SIZE is not; start with torchrun or deepspeed"]


def test_a_missing_deepspeed_is_one_line(data_dir, tmp_path):
    variables = LAUNCHED | {"MASTER_PORT": free_port()}
    arguments = flags(data_dir, tmp_path, *TINY, "--deepspeed")
    found = run_as_rank(variables, arguments, before="import sys; sys.modules['deepspeed'] = None")
    assert found == ["error: --deepspeed needs a package: pip install deepspeed"]


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    for name, value in (LAUNCHED | {"MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes on this machine, but 2 CUDA device.*--nproc_per_node 2"):
        device_of_rank(torch.device("cuda"))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no such file"),
        ("{", "is not JSON"),
        ("{}", "stage"),
        ('{"zero_optimization": {"stage": 0}}', "stage"),
        ('{"zero_optimization": {"stage": 2}, "train_batch_size": 64}', "train_batch_size is decided by --batch_size"),
        ('{"zero_optimization": {"stage": 2}, "gradient_clipping": 5}', "gradient_clipping is decided by"),
        ('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}', "optimizer is decided by --optimizer"),
        ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', "bf16 is decided by --dtype"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_flags_is_refused(content, message, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    args = Namespace(deepspeed=str(path), batch_size=2, accumulation_steps=3, grad_clip=1.0)
    with pytest.raises(ValueError, match=message):
        deepspeed_config(args, torch.float32)


def test_a_deepspeed_file_is_completed_by_the_flags(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "train_batch_size": "auto", '
        '"gradient_clipping": 0.5}'
    )
    config = deepspeed_config(
        Namespace(deepspeed=str(path), batch_size=2, accumulation_steps=3, grad_clip=0.5), torch.bfloat16
    )
    assert config["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert config["train_micro_batch_size_per_gpu"] == 2 and config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.5 and "train_batch_size" not in config
    assert config["torch_autocast"]["enabled"] and config["torch_autocast"]["dtype"] == "bfloat16"
