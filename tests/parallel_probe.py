"""Run by torchrun in test_launchers.py: what a rank holds, and how often gradients travel, under every launcher.

Writes FOLDER/rank{N}.json: {launcher: {"weights": bytes, "optimizer": bytes, "reductions": {micro-batches: number}}}.
"""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model.LMConfig import LMConfig  # noqa: E402
from model.model import Transformer  # noqa: E402
from model.optim import make_optimizer  # noqa: E402
from model.parallel import DDP, FSDP, ZeRO  # noqa: E402

CPU = torch.device("cpu")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: under FSDP a DTensor's slice, under ZeRO 3 ds_tensor."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)


def num_bytes(tensors) -> int:
    return sum(local(tensor).numel() * local(tensor).element_size() for tensor in tensors)


def optimizer_tensors(optimizer):
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return [value for state in states for value in state.values() if torch.is_tensor(value) and value.dim()]


def take_step(parallel, model, num_micro_batches: int) -> int:
    """One optimizer step; returns how many reductions of gradients the processes did together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for i in range(num_micro_batches):
            with parallel.sync_grads(last=i == num_micro_batches - 1):
                logits, aux = model(torch.arange(32).view(2, 16))
                parallel.backward(logits.float().square().mean() / num_micro_batches + aux)
    names = ("c10d::allreduce_", "c10d::reduce_scatter_", "c10d::_reduce_scatter_base_")
    reductions = sum(event.count for event in profile.key_averages() if event.key in names)
    parallel.step(1.0)
    return reductions


def main() -> None:
    dist.init_process_group("gloo")
    config = Namespace(optimizer="adamw", batch_size=2, accumulation_steps=1, grad_clip=1.0)
    found = {}
    makers = {"ddp": lambda: DDP(CPU, torch.float32), "fsdp": lambda: FSDP(CPU, torch.float32, False)}
    for stage in (1, 2, 3):
        path = f"zero{stage}"
        makers[path] = lambda path=path: ZeRO(CPU, torch.float32, Namespace(**vars(config), deepspeed=path))
    for name, make in makers.items():
        torch.manual_seed(0)
        model = Transformer(LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512))
        parallel = make()
        wrapped, optimizer = parallel.wrap(model, make_optimizer(model, "adamw", 1e-3, 0.1))
        reductions = {count: take_step(parallel, wrapped, count) for count in (1, 4)}
        found[name] = {
            "weights": num_bytes(model.parameters()),
            "optimizer": num_bytes(optimizer_tensors(optimizer)),
            "reductions": reductions,
        }
    (Path(sys.argv[1]) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
