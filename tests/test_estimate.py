"""model/memory.py against what autograd keeps and against a real run; scripts/estimate.py."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model.model
from model.cli import run_main
from model.LMConfig import SIZES, LMConfig
from model.lora import LoRAConfig, add_adapter
from model.memory import LAUNCHERS, block_activations, estimate_memory, memory_line, parameter_count
from model.model import Transformer
from model.optim import make_optimizer

REPO = Path(__file__).resolve().parents[1]
SHAPE = {"batch_size": 2, "max_seq_len": 64}
MOE = {"use_moe": True, "num_experts_per_tok": 2, "n_routed_experts": 4}


def estimated(config: LMConfig, **changes) -> dict[str, int]:
    return estimate_memory(config, **{**SHAPE, "dtype": torch.bfloat16, **changes})


@pytest.fixture
def config(tiny_config):
    """Wide enough that what is counted a position, and not the few numbers beside it, decides."""
    return lambda **changes: tiny_config(**{"dim": 64, "hidden_dim": 176, "vocab_size": 320, "n_layers": 3, **changes})


# ---------------------------------------------------------------- parameters and shares


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_real_model(size):
    config = LMConfig.from_size(size, n_layers=2)  # two layers, to be quick
    model = Transformer(config)
    assert parameter_count(config) == (model.num_parameters(), model.num_parameters(active=True))


def test_parts_sum_up_in_the_line(config):
    parts = estimated(config())
    assert list(parts) == ["weights", "gradients", "optimizer", "activations", "logits", "other"]
    assert all(type(size) is int and size > 0 for size in parts.values())
    line = memory_line({"weights": 3 * 2**30, "other": 2**29})
    assert line == "memory about 3.50 GiB a process: weights 3.00, other 0.50"


def test_weights_gradients_and_optimizer_of_one_process_are_its_tensors(config):
    for changes in ({}, MOE):
        total = parameter_count(config(**changes))[0]
        parts = estimated(config(**changes), dtype=torch.float32)
        assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4 * total, 4 * total, 8 * total)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_state_is_that_of_the_real_optimizer(config, optimizer):
    net = Transformer(config(**MOE))
    real = make_optimizer(net, optimizer, 1e-3, 0.1)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    real.step()
    held = sum(x.nbytes for state in real.state.values() for key, x in state.items() if key != "step")
    assert estimated(config(**MOE), optimizer=optimizer)["optimizer"] == held


@pytest.mark.parametrize("launcher", LAUNCHERS[1:])
def test_what_a_launcher_shares_halves_with_two_processes(config, launcher):
    shared = {
        "ddp": (),
        "fsdp": ("weights", "gradients", "optimizer"),
        "zero1": ("optimizer",),
        "zero2": ("gradients", "optimizer"),
        "zero3": ("weights", "gradients", "optimizer"),
    }[launcher]
    tiny = config()
    total = parameter_count(tiny)[0]
    whole = {"weights": 4 * total, "gradients": 4 * total, "optimizer": 8 * total}
    if launcher.startswith("zero"):
        whole["optimizer"] += 4 * total
    one, two, four = (estimated(tiny, launcher=launcher, world_size=n, dtype=torch.float32) for n in (1, 2, 4))
    for part, size in whole.items():
        assert one[part] - two[part] == (size // 2 if part in shared else 0), part
        assert two[part] - four[part] == (size // 4 if part in shared else 0), part
    for part in ("activations", "logits", "other"):
        assert one[part] == two[part]


def test_an_adapter_needs_gradients_and_optimizer_for_itself_only(config):
    tiny = config()
    total = parameter_count(tiny)[0]
    whole, adapter = estimated(tiny, dtype=torch.float32), estimated(tiny, dtype=torch.float32, trainable=1000)
    assert (adapter["gradients"], adapter["optimizer"]) == (4000, 8000)
    assert adapter["weights"] == 4 * (total + 1000)
    assert whole["activations"] / 2 < adapter["activations"] < whole["activations"]


def test_logits_follow_the_share_of_targets(config):
    whole, half = estimated(config()), estimated(config(), target_share=0.5)
    assert half["logits"] == whole["logits"] / 2
    assert half["activations"] == whole["activations"]


def test_what_a_run_refuses_is_refused(config):
    with pytest.raises(ValueError, match="unknown launcher 'horovod'"):
        estimated(config(), launcher="horovod")
    with pytest.raises(ValueError, match="world_size 2 needs a launcher"):
        estimated(config(), world_size=2)
    with pytest.raises(ValueError, match="Muon"):
        estimated(config(), launcher="zero1", optimizer="muon")


# ---------------------------------------------------------------- activations against autograd


def kept_bytes(net: Transformer, dtype: torch.dtype) -> int:
    """Bytes of the storages that live from the forward pass to the backward pass, without weights and input ids.

    They are what autograd saves, and the inputs of blocks that are to be computed again.
    """
    shape = SHAPE["batch_size"], SHAPE["max_seq_len"]
    input_ids = torch.randint(net.config.vocab_size, shape)
    documents = (torch.rand(shape) < 1 / 16).cumsum(1) + 1
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    if net.grad_checkpoint:
        for block in net.layers:
            block.register_forward_pre_hook(lambda block, inputs: kept.append(inputs[0]))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits, aux = net(input_ids, documents=documents)
        F.cross_entropy(logits.flatten(0, 1).float(), input_ids.roll(-1, 1).flatten(), reduction="sum")
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    for x in (*net.parameters(), input_ids):
        storages.pop(x.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def make(config: LMConfig, how: str) -> tuple[Transformer, dict]:
    """A model to train, and the same in estimate_memory's terms."""
    net = Transformer(config).train()
    if how == "adapter":
        add_adapter(net, LoRAConfig(rank=1))
    net.grad_checkpoint = how == "grad_checkpoint"
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return net, {
        "trainable": trained if how == "adapter" else None,
        "grad_checkpoint": net.grad_checkpoint,
        "device_type": "cuda" if how == "sdpa" else "cpu",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("changes", [{}, MOE, {"dropout": 0.1}], ids=["dense", "moe", "dropout"])
@pytest.mark.parametrize("how", ["whole", "grad_checkpoint", "adapter", "sdpa"])
def test_a_block_keeps_what_the_formula_says(config, monkeypatch, dtype, changes, how):
    """Within 3%, by the difference of three layers and two. sdpa is what a GPU computes."""
    if how == "sdpa":
        monkeypatch.setattr(model.model, "use_block_attention", lambda device: False)
    kept, formula = [], []
    for n_layers in (2, 3):
        net, terms = make(config(n_layers=n_layers, **changes), how)
        parts = estimated(net.config, dtype=dtype, **terms)
        copies = parts["weights"] - 4 * sum(p.numel() for p in net.parameters())  # in `dtype`, also kept by autograd
        formula.append(parts["activations"] + copies)
        kept.append(kept_bytes(net, dtype))
    assert kept[1] - kept[0] == pytest.approx(formula[1] - formula[0], rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "moe"])
def test_a_model_keeps_what_the_formula_says(config, dtype, changes):
    """Within 3%: the blocks, what is after them, and the log-softmax."""
    net, terms = make(config(**changes), "whole")
    positions = SHAPE["batch_size"] * SHAPE["max_seq_len"]
    parts = estimated(net.config, dtype=dtype, **terms)
    _, in_flight = block_activations(net.config, SHAPE["max_seq_len"], dtype)
    copies = parts["weights"] - 4 * sum(p.numel() for p in net.parameters())
    log_softmax = positions * net.config.vocab_size * 4
    formula = parts["activations"] - positions * in_flight + copies + log_softmax
    assert kept_bytes(net, dtype) == pytest.approx(formula, rel=0.03)


# ---------------------------------------------------------------- scripts/estimate.py


@pytest.fixture
def script(capsys):
    """script(flags): exit code, stdout and stderr of scripts/estimate.py, run in this process."""
    spec = importlib.util.spec_from_file_location("estimate", REPO / "scripts/estimate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(flags: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            run_main(lambda: module.main(flags.split()))
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_estimate_is_near_what_a_real_run_takes(tmp_path):
    flags = "--override dim=64 n_layers=2 n_heads=4 n_kv_heads=2 --batch_size 16 --max_seq_len 64 --device cpu"
    flags += " --dtype float32 --measure --json"
    command = [sys.executable, str(REPO / "scripts/estimate.py"), *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert 0.8 < report["measured"]["estimate_to_measured"] < 1.2
    assert report["measured"]["tokens_per_second"] > 0
    assert not list(tmp_path.iterdir())


def test_time_money_and_energy_of_an_epoch(script):
    flags = "--size tiny --batch_size 4 --max_seq_len 256 --launcher ddp --world_size 2 --accumulation_steps 2"
    flags += " --device cuda --dtype bfloat16 --tokens_per_second 1000 --epoch_tokens 7200000 --price_per_hour 3"
    code, out, err = script(flags + " --watts 500 --price_per_kwh 0.2 --json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["tokens_per_step"] == 4 * 256 * 2 * 2
    assert report["epoch"] == {
        "tokens": 7_200_000,
        "steps": 1758,
        "seconds": 7200.0,
        "price": 6.0,
        "kwh": 1.0,
        "energy_price": pytest.approx(0.2),
    }


def test_tokens_of_a_file_and_the_printed_table(script, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("text\n" + "你好，世界。\n" * 50, encoding="utf-8")
    flags = f"--size moe --batch_size 2 --max_seq_len 16 --device cpu --lora_rank 4 --data_path {data}"
    code, out, _ = script(flags + " --tokens_per_second 10 --price_per_hour 36 --currency EUR --watts 1")
    assert code == 0
    for text in ("active for a token", "an adapter's", "activations", "memory about ", "an epoch", " EUR", " kWh"):
        assert text in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--override dim=100", "dim 100 is not a multiple of n_heads"),
        ("--override width=3", "unknown model setting 'width'"),
        ("--world_size 2", "world_size 2 needs a launcher"),
        ("--launcher ddp --measure", "leave out --launcher ddp"),
        ("--watts 300", "give --epoch_tokens"),
        ("--price_per_kwh 1", "--price_per_kwh needs --watts"),
        ("--data_path nowhere.csv", "nowhere.csv"),
        ("--device abacus", "unknown device 'abacus'"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(script, flags, message):
    code, out, err = script(flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
