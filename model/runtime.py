"""Where a run happens: device, number format, processes, signals. How they share a model is in parallel.py; no
other file than these two knows of torch.distributed and DeepSpeed."""

import contextlib
import ctypes
import datetime
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model.dataset import IGNORE, Batch, DPOData, MixedData, PairBatch, PretrainData, SFTData
from model.memory import estimate_memory, memory_line
from model.optim import has_bfloat16
from model.parallel import DDP, FSDP, Single, ZeRO

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; auto takes cuda, then mps, then cpu.

    Raises: ValueError when the named device is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name!r} is not one this toolkit runs on; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: this machine or this torch build has no CUDA; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not available here; use --device cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The number format for products, and the reason for it; auto takes bfloat16 where the hardware has it."""
    if name != "auto":
        return DTYPES[name], "asked for"
    if has_bfloat16(device):
        return torch.bfloat16, "computed natively"
    if device.type == "cuda":
        return torch.float16, "the GPU is older than sm80, so float16 with a gradient scaler"
    return torch.float32, f"no native bfloat16 on this {device.type}"


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next tensor instead of returning it to the system.

    By default a tensor over 32 MB is mapped from the system anew each time, and clearing its pages costs more
    than most operations on it: a training step of the small model takes about a third less time with this.
    Does nothing where the C library is not glibc.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product here and now: what MFU is measured against."""
    n = 4096 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    a = torch.randn(n, n, generator=generator, device=device).to(dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was queued, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: of the GPU on cuda, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):  # Linux; ru_maxrss counts the process that started this one too
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_of_rank(device: torch.device) -> torch.device:
    """The device of this process among those a launcher started on this machine: one GPU each.

    Raises: ValueError when there are more processes than GPUs, or the launcher did not say which process this is.
    """
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"RANK is set in the environment but {missing[0]} is not; start with torchrun or deepspeed")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
    if device.type == "mps" and processes > 1:
        raise ValueError(f"{processes} processes, but one Apple GPU; use one process, or --device cpu")
    if device.type != "cuda":
        return device
    if processes > torch.cuda.device_count():
        raise ValueError(
            f"{processes} processes on this machine, but {torch.cuda.device_count()} CUDA device(s): one process a "
            f"device, --nproc_per_node {torch.cuda.device_count()}"
        )
    return pick_device(f"cuda:{os.environ['LOCAL_RANK']}")


def pick_parallel(args, device: torch.device, dtype: torch.dtype, launched: bool) -> Single:
    """How the processes share the model, as flags and launcher ask. Raises: ValueError when they do not fit."""
    if args.fsdp and args.deepspeed:
        raise ValueError("--fsdp and --deepspeed exclude each other")
    if (args.fsdp or args.deepspeed) and not launched:
        flag = "--fsdp" if args.fsdp else "--deepspeed"
        script = os.path.basename(sys.argv[0])
        raise ValueError(f"{flag} needs a launcher, also for one process: torchrun --nproc_per_node N {script} {flag}")
    if args.cpu_offload and not (args.fsdp and device.type == "cuda"):
        raise ValueError("--cpu_offload keeps FSDP's shares in the CPU's memory: it goes with --fsdp on a GPU")
    if args.fsdp:
        return FSDP(device, dtype, args.cpu_offload)
    if args.deepspeed or args.local_rank is not None:  # only the deepspeed launcher passes --local_rank
        return ZeRO(device, dtype, args)
    return DDP(device, dtype) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else Single(device, dtype)


def join_processes(device: torch.device) -> None:
    """Makes the process group. Raises: ValueError that names the address when the others cannot be met there."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30)
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"the processes cannot meet at {address} ({reason}); if another program uses that port, give the launcher "
            "another: torchrun --master_port, deepspeed --master_port, or torchrun --standalone on one machine"
        ) from None


class Run:
    """One training run as this process sees it.

    A script asks nothing else of the hardware: .device .dtype .rank .world_size .is_main .backend
    .stop_requested and the methods below. Under torchrun and deepspeed every process has its own rank and device.

    Raises: ValueError from the constructor when flags, launcher and machine do not fit together.
    """

    def __init__(self, args):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.device = pick_device(args.device)
        launched = "RANK" in os.environ
        if launched:
            self.device = device_of_rank(self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        elif self.device.type == "cpu":
            keep_freed_memory()
        self.dtype, reason = pick_dtype(args.dtype, self.device)
        self.parallel = pick_parallel(args, self.device, self.dtype, launched)
        self.backend = self.parallel.name
        if self.backend != "none":
            join_processes(self.device)
            # the other ranks wait here while rank 0 tokenizes the data, which may take hours
            self.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
        random.seed(args.seed)
        torch.manual_seed(args.seed + self.rank)
        self.stop_requested: str | None = None  # the name of the signal that asked to save and stop
        dtype_name = str(self.dtype).removeprefix("torch.")
        how = "1 process" if self.backend == "none" else f"{self.world_size} process(es), {self.backend}"
        self.print(f"device {self.device}, {dtype_name} ({reason}), {how}, seed {args.seed}")

    def _listen(self) -> None:
        """The first Ctrl-C or SIGTERM asks the loop to save and stop after its step; the same again stops at once.

        Another one does not: a launcher sends SIGTERM on the Ctrl-C that this process has already seen.
        """

        def on_signal(number, frame):
            if self.stop_requested == signal.Signals(number).name:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            if self.stop_requested:
                return
            self.stop_requested = signal.Signals(number).name
            if self.is_main:  # print could be what was interrupted, and it cannot be entered twice
                os.write(2, f"\n{self.stop_requested}: saving after this step; once more to stop at once\n".encode())

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)

    def print(self, *values: Any) -> None:
        """Prints on rank 0 only."""
        if self.is_main:
            print(*values, flush=True)

    def main_first(self, build: Callable[[], Any]) -> Any:
        """Runs `build` on rank 0, then on the others: they find what rank 0 has written.

        Raises: what `build` raises; the other ranks then leave with exit code 2 and say nothing.
        """
        if self.backend == "none":
            return build()
        built = error = None
        if self.is_main:
            try:
                built = build()
            except (ValueError, OSError) as caught:
                error = caught
        failed = torch.tensor(error is not None, dtype=torch.int32)
        dist.all_reduce(failed, group=self.patient)
        if failed:
            raise error or SystemExit(2)
        return built if self.is_main else build()

    def place(self, model: nn.Module, args) -> None:
        """Moves the model to the device, ready to train, as --grad_checkpoint and --compile ask.

        Raises: ValueError when --compile finds no C++ compiler for the CPU.
        """
        model.to(self.device).train()
        model.grad_checkpoint = args.grad_checkpoint
        if args.compile:
            if self.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
                raise ValueError(
                    "--compile needs a C++ compiler (g++ or clang++) on the CPU; install one or leave it out"
                )
            model.compile()

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and optimizer as the launcher needs them; weights are made equal on all ranks.

        From here on there is something to save: the first Ctrl-C or SIGTERM no longer ends the process.
        """
        self._listen()
        return self.parallel.wrap(model, optimizer)

    @staticmethod
    def unwrap(model: nn.Module) -> nn.Module:
        """The Transformer inside what `wrap` returned."""
        return getattr(model, "module", model)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Products in self.dtype, the rest in float32; nothing at all for float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sync_grads(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are summed over the ranks in the last micro-batch of a step only (ZeRO 2 and 3: in each)."""
        return self.parallel.sync_grads(last)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this rank's share of the step's loss. DDP, FSDP and ZeRO average; undone here."""
        self.parallel.backward(loss * self.world_size)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> float:
        """Clips, updates the weights, clears the gradients; returns the gradient's norm before clipping."""
        return self.parallel.step(clip)

    def check_finite(self, loss: float, grad_norm: float, where: str) -> None:
        """Raises ValueError, saying where, when the loss or the gradient is no number: the step was not taken.

        With fp16 a gradient that overflows is how the scaler finds its scale; only the loss counts there.
        """
        bad = loss - loss != 0 or (grad_norm - grad_norm != 0 and not self.parallel.scaler.is_enabled())
        if bad:
            raise ValueError(
                f"loss {loss}, gradient norm {grad_norm} at {where}: stopped, the last save is untouched; "
                "continue it with --resume and a lower --learning_rate, or look at that data"
            )

    @torch.no_grad()
    def held_out(self, model: nn.Module, data, batch_size: int) -> dict:
        """Mean loss in nats a target token and bits a byte of target text, over all rows of `data`, all ranks."""
        started = time.perf_counter()
        was_training = model.training
        model.eval()
        nats = 0.0
        hidden = not (self.is_main and sys.stderr.isatty())
        # as many turns on every rank, the last with padding alone: FSDP and ZeRO 3 compute together
        together = range(0, data.num_rows, self.world_size * batch_size)
        for first in tqdm(together, desc="held-out", delay=2, leave=False, disable=hidden):
            start = first + self.rank * batch_size
            batch = data.rows(0, start, start + batch_size).to(self.device)
            keep = batch.labels != IGNORE
            with self.autocast():
                logits, _ = model(batch.input_ids, documents=batch.documents, select=keep)
            nats += F.cross_entropy(logits.float(), batch.labels[keep], reduction="sum").item()
        model.train(was_training)
        nats = self.sum(nats)
        return {
            "loss": nats / data.num_tokens,
            "bits_per_byte": nats / math.log(2) / data.num_bytes,
            "tokens": data.num_tokens,
            "seconds": time.perf_counter() - started,
        }

    def sum(self, value: Tensor | float) -> float | list[float]:
        """The sum of a number over all ranks; of a vector, the sums as a list."""
        total = torch.as_tensor(value, dtype=torch.float64, device="cpu" if self.device.type == "mps" else self.device)
        if self.backend != "none":
            dist.all_reduce(total)
        return total.tolist()

    def should_stop(self) -> bool:
        """True on all ranks as soon as one was asked to stop."""
        return self.sum(self.stop_requested is not None) > 0

    @property
    def exit_code(self) -> int:
        """0, or as the shell counts it, 128 + the number of the signal that stopped the run."""
        return 128 + signal.Signals[self.stop_requested] if self.stop_requested else 0

    def barrier(self) -> None:
        if self.backend != "none":
            dist.barrier()

    def close(self) -> None:
        """Ends the process group."""
        if self.backend != "none":
            dist.destroy_process_group()

    def require_same(self, value: str, what: str) -> None:
        """Raises ValueError on all ranks when `value` is not the same on all: their machines see different files."""
        values = self.all_gather(value)
        if len(set(values)) > 1:
            other = next(i for i, found in enumerate(values) if found != values[0])
            raise ValueError(
                f"{what} is {values[0]} on rank 0 but {values[other]} on rank {other}: every machine must see the same "
                "files, in a shared folder or copied"
            )

    def all_gather(self, value: Any) -> list:
        """The values of all ranks, in order."""
        if self.backend == "none":
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def rng_states(self) -> list[dict[str, Tensor]]:
        """The states of torch's random generators (dropout draws from them), of every rank."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return self.all_gather(state)

    def set_rng_states(self, states: list[dict[str, Tensor]]) -> None:
        """Takes up this rank's state; with another number of ranks than saved, the seed's stays."""
        if len(states) != self.world_size:
            return
        state = states[self.rank]
        torch.set_rng_state(state["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)


class Plan:
    """Which rows every optimizer step takes, and which of them this rank computes in which micro-batch.

    A step takes the next rows_per_step rows of the epoch's order. They depend on nothing else, so the same
    rows make a step however they are split over micro-batches and ranks.
    """

    def __init__(self, data: PretrainData | SFTData | MixedData | DPOData, args, run: Run, model: nn.Module):
        self.data, self.device = data, run.device
        self.batch_size, self.accumulation_steps = args.batch_size, args.accumulation_steps
        self.rank, self.world_size = run.rank, run.world_size
        self.rows_per_step = args.batch_size * args.accumulation_steps * run.world_size
        self.steps_per_epoch = -(-data.num_rows // self.rows_per_step)
        self.total_steps = args.epochs * self.steps_per_epoch
        if args.max_steps:
            self.total_steps = min(self.total_steps, args.max_steps)
        default_warmup = round(0.03 * self.total_steps)
        self.warmup_steps = default_warmup if args.warmup_steps is None else args.warmup_steps
        unit = "pairs of at most" if isinstance(data, DPOData) else "rows of"
        run.print(
            f"{data.num_rows:,} {unit} {args.max_seq_len}, {data.num_tokens:,} target tokens an epoch; "
            f"{self.rows_per_step} rows a step, {self.total_steps} steps, {self.warmup_steps} of them warm-up"
        )
        run.print(memory_line(self._estimate_memory(args, run, model)))

    def _estimate_memory(self, args, run: Run, model: nn.Module) -> dict[str, int]:
        """What estimate_memory says of this run; for pairs, of a batch of the longest ones."""
        rows, length = args.batch_size, args.max_seq_len
        targets = self.data.num_tokens / self.data.num_rows  # of a row, or of both sides of a pair
        if isinstance(self.data, DPOData):
            rows, length, targets = 2 * rows, self.data.longest, targets / 2
        trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        parts = estimate_memory(
            model.config,
            batch_size=rows,
            max_seq_len=length,
            dtype=run.dtype,
            device_type=run.device.type,
            launcher=f"zero{run.parallel.stage}" if run.backend == "deepspeed" else run.backend,
            world_size=run.world_size,
            optimizer=args.optimizer,
            grad_checkpoint=args.grad_checkpoint,
            target_share=min(1.0, targets / length),
            trainable=sum(trained) if len(trained) < len(list(model.parameters())) else None,
        )
        if getattr(args, "ref_cache", None) == "":  # DPO's second model, whole on every rank
            parts["weights"] += 4 * model.num_parameters()
        return parts

    def batches(self, step: int) -> list[Batch] | list[PairBatch]:
        """This rank's micro-batches of optimizer step `step`, counted from 0, on the device."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.rows_per_step
        batches = []
        for index in range(self.accumulation_steps):
            together = first + index * self.batch_size * self.world_size  # first row of all ranks' batches
            if together < self.data.num_rows:  # the last step of an epoch may be short
                start = together + self.rank * self.batch_size
                batches.append(self.data.rows(epoch, start, start + self.batch_size).to(self.device))
        return batches

    def position(self, step: int) -> str:
        """Where in the data a step is, for people."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.rows_per_step
        return f"epoch {epoch + 1}, rows {first} to {first + self.rows_per_step - 1} of its order"

    def due(self, step: int, interval: int) -> bool:
        """True after every `interval` steps (0: never) and after the last."""
        return step + 1 == self.total_steps or (interval > 0 and (step + 1) % interval == 0)

    def identity(self) -> dict:
        """What decides which tokens a step sees; equal for a run and its continuation."""
        return {
            "data": self.data.fingerprint,
            "seed": self.data.seed,
            "max_seq_len": self.data.max_seq_len,
            "rows_per_step": self.rows_per_step,
        }
