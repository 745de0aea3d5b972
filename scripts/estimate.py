"""Says before a training run what it will take: memory by part, and time, money and energy of an epoch.

    python scripts/estimate.py --size base --batch_size 16 --max_seq_len 512 --launcher ddp --world_size 2
    python scripts/estimate.py --size small --measure --epoch_tokens 20000000
    python scripts/estimate.py --size base --device cuda --tokens_per_second 150000 --epoch_tokens 2000000000 \\
        --price_per_hour 1.5 --watts 400 --price_per_kwh 0.3

The memory comes from formulas (model/memory.py), for a GPU that is not here too: --device cuda. --measure trains ten
steps on random tokens and shows what they really took beside it.

训练之前估算一次运行的开销：各部分占用的内存，以及每轮（epoch）所需的时间、费用与用电量。
内存由公式算出（model/memory.py），本机没有 GPU 也可以用 --device cuda 估算；
--measure 会用随机词元实际训练十步，并列出实测值。
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

from model.cli import ROOT, number, overrides, positive_float, positive_int, run_main  # noqa: E402
from model.dataset import PretrainData  # noqa: E402
from model.LMConfig import SIZES, LMConfig  # noqa: E402
from model.lora import LoRAConfig, add_adapter  # noqa: E402
from model.memory import LAUNCHERS, estimate_memory, memory_line, parameter_count  # noqa: E402
from model.model import Transformer  # noqa: E402
from model.optim import make_optimizer  # noqa: E402
from model.runtime import DTYPES, Run, peak_memory_bytes, pick_device, pick_dtype, synchronize  # noqa: E402
from model.tokenizer import load_tokenizer  # noqa: E402

MEASURED_STEPS = 10
WARM_UP_STEPS = 2  # of them; not timed
DOCUMENT_TOKENS = 64  # about the mean of the demo corpus, for the random rows
GIB = 2**30


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="model size (default: small, 26M)")
    add("--override", nargs="+", default=[], metavar="NAME=VALUE", help="LMConfig fields, e.g. dim=384")
    add("--batch_size", type=positive_int, default=32, help="rows of a micro-batch on one device (default: 32)")
    add("--max_seq_len", type=number(int, 8), default=512, help="tokens of a row (default: 512)")
    add("--accumulation_steps", type=positive_int, default=1, help="micro-batches of one optimizer step (default: 1)")
    add("--optimizer", choices=["adamw", "muon"], default="adamw", help="as in training (default: adamw)")
    add("--grad_checkpoint", action="store_true", help="less memory for activations, about a third more time")
    add("--lora_rank", type=positive_int, metavar="R", help="train an adapter of this rank on all linear layers")
    add(
        "--target_share",
        type=number(float, 0, 1, above=True),
        default=1.0,
        help="share of the tokens that are targets: 1 in pretraining, that of the answers in fine-tuning (default: 1)",
    )
    add("--launcher", choices=LAUNCHERS, default="none", help="how processes share the model (default: none)")
    add("--world_size", type=positive_int, default=1, help="processes, one a device (default: 1)")
    add("--device", default="auto", help="auto, cpu, cuda or mps; it need not be here (default: auto)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="number format of the products; auto: as training picks it, bfloat16 for a GPU that is not here "
        "(default: auto)",
    )
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--tokens_per_second", type=positive_float, help="of all processes together, as the log says it")
    speed.add_argument(
        "--measure", action="store_true", help=f"train {MEASURED_STEPS} steps on random tokens, in one process"
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--epoch_tokens", type=positive_int, help="tokens of an epoch")
    data.add_argument("--data_path", help="pretraining data whose tokens are an epoch; tokenized at the first use")
    add(
        "--tokenizer_dir",
        default=str(ROOT / "model/minimind_tokenizer"),
        help="folder with tokenizer.json, for --data_path (default: model/minimind_tokenizer)",
    )
    add("--price_per_hour", type=positive_float, help="of all devices together")
    add("--watts", type=positive_float, help="power of all devices together")
    add("--price_per_kwh", type=positive_float, help="of energy")
    add("--currency", default="", help="printed after every price")
    add("--json", action="store_true", help="print one JSON object instead, bytes and seconds")
    # what else a run looks at
    parser.set_defaults(seed=1337, compile=False, fsdp=False, cpu_offload=False, deepspeed=None, local_rank=None)
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raises ValueError where a flag would do nothing, or needs another one."""
    if args.measure and args.launcher != "none":
        raise ValueError(f"--measure trains in one process; leave out --launcher {args.launcher}")
    has_time = (args.measure or args.tokens_per_second) and (args.epoch_tokens or args.data_path)
    if (args.price_per_hour or args.watts) and not has_time:
        raise ValueError(
            "money and energy come from the time of an epoch: give --epoch_tokens or --data_path, "
            "and --tokens_per_second or --measure"
        )
    if args.price_per_kwh and not args.watts:
        raise ValueError("--price_per_kwh needs --watts")


def place(args: argparse.Namespace) -> tuple[str, torch.dtype]:
    """Type of the device and number format; unlike a run's, the device need not be on this machine."""
    kind = args.device.partition(":")[0]
    absent = kind == "cuda" and not torch.cuda.is_available() or kind == "mps" and not torch.backends.mps.is_available()
    if absent and not args.measure:
        return kind, DTYPES[args.dtype if args.dtype != "auto" else {"cuda": "bfloat16", "mps": "float32"}[kind]]
    device = pick_device(args.device)
    return device.type, pick_dtype(args.dtype, device)[0]


def adapter_parameters(config: LMConfig, rank: int) -> int:
    """Trained parameters of an adapter on all linear layers; allocates nothing."""
    with torch.device("meta"):
        model = Transformer(config)
        add_adapter(model, LoRAConfig(rank=rank))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def measure(args: argparse.Namespace, config: LMConfig) -> dict[str, float]:
    """Trains on random tokens as 1-pretrain.py does; with a --target_share, as 3-full_sft.py does.

    Returns tokens_per_second after the warm-up, and peak_bytes.
    """
    with contextlib.redirect_stdout(sys.stderr):  # where the run says what it runs on
        run = Run(args)
    model = Transformer(config)
    if args.lora_rank:
        add_adapter(model, LoRAConfig(rank=args.lora_rank))
    run.place(model, args)
    model, optimizer = run.parallel.wrap(model, make_optimizer(model, args.optimizer, 5e-4, 0.1))
    shape = (args.batch_size, args.max_seq_len)
    for step in tqdm(range(MEASURED_STEPS), desc="measuring", unit="step", disable=not sys.stderr.isatty()):
        if step == WARM_UP_STEPS:
            synchronize(run.device)
            start = time.perf_counter()
        for _ in range(args.accumulation_steps):
            input_ids = torch.randint(config.vocab_size, shape, device=run.device)
            labels = input_ids.roll(-1, 1)
            documents = (torch.rand(shape, device=run.device) < 1 / DOCUMENT_TOKENS).cumsum(1).int() + 1
            targets = None if args.target_share == 1 else torch.rand(shape, device=run.device) < args.target_share
            with run.autocast():
                logits, aux = model(input_ids, documents=documents, select=targets)  # (B, T, V) or (N, V)
            labels = labels.flatten() if targets is None else labels[targets]
            loss = F.cross_entropy(logits.flatten(0, -2).float(), labels, reduction="sum") / max(1, labels.numel())
            run.backward((loss + aux) / args.accumulation_steps)
        run.step(model, optimizer, 1.0)
    synchronize(run.device)
    tokens = (MEASURED_STEPS - WARM_UP_STEPS) * args.accumulation_steps * args.batch_size * args.max_seq_len
    return {"tokens_per_second": tokens / (time.perf_counter() - start), "peak_bytes": peak_memory_bytes(run.device)}


def estimate(args: argparse.Namespace) -> dict:
    """All figures that the flags allow."""
    config = LMConfig.from_size(args.size, max_seq_len=args.max_seq_len, **overrides(args.override))
    device_type, dtype = place(args)
    total, active = parameter_count(config)
    report = {
        "parameters": total,
        "active_parameters": active,
        "device": device_type,
        "dtype": str(dtype).removeprefix("torch."),
        "processes": args.world_size,
        "tokens_per_step": args.batch_size * args.accumulation_steps * args.max_seq_len * args.world_size,
    }
    if args.lora_rank:
        report["trained_parameters"] = adapter_parameters(config, args.lora_rank)
    report["memory_bytes"] = estimate_memory(
        config,
        batch_size=args.batch_size,
        max_seq_len=args.max_seq_len,
        dtype=dtype,
        device_type=device_type,
        launcher=args.launcher,
        world_size=args.world_size,
        optimizer=args.optimizer,
        grad_checkpoint=args.grad_checkpoint,
        target_share=args.target_share,
        trainable=report.get("trained_parameters"),
    )
    tokens = args.epoch_tokens
    if args.data_path:
        data = PretrainData(args.data_path, load_tokenizer(args.tokenizer_dir), args.max_seq_len)
        tokens = data.num_rows * args.max_seq_len
    speed = args.tokens_per_second
    if args.measure:
        report["measured"] = measured = measure(args, config)
        measured["estimate_to_measured"] = sum(report["memory_bytes"].values()) / measured["peak_bytes"]
        speed = measured["tokens_per_second"]
    if tokens:
        report["epoch"] = epoch = {"tokens": tokens, "steps": -(-tokens // report["tokens_per_step"])}
        if speed:
            epoch["seconds"] = seconds = tokens / speed
            if args.price_per_hour:
                epoch["price"] = seconds / 3600 * args.price_per_hour
            if args.watts:
                epoch["kwh"] = seconds / 3600 * args.watts / 1000
            if args.price_per_kwh:
                epoch["energy_price"] = epoch["kwh"] * args.price_per_kwh
    return report


def show(report: dict, currency: str) -> None:
    """Prints the figures for people."""
    active = report["active_parameters"]
    note = f", {active:,} active for a token" if active < report["parameters"] else ""
    print(f"parameters        {report['parameters']:,}{note}")
    if "trained_parameters" in report:
        print(f"trained           {report['trained_parameters']:,}, an adapter's")
    print(f"tokens a step     {report['tokens_per_step']:,}, {report['processes']} process(es)")
    parts = report["memory_bytes"]
    print(f"memory a process, GiB, on {report['device']} in {report['dtype']}")
    for name, size in [*parts.items(), ("together", sum(parts.values()))]:
        print(f"  {name:<12}{size / GIB:10.2f}")
    print(memory_line(parts))
    if "measured" in report:
        m = report["measured"]
        print(f"measured          {m['peak_bytes'] / GIB:.2f} GiB, estimate / measured {m['estimate_to_measured']:.2f}")
        print(f"measured          {m['tokens_per_second']:,.0f} tokens a second")
    if "epoch" in report:
        epoch = report["epoch"]
        print(f"an epoch          {epoch['tokens']:,} tokens, {epoch['steps']:,} steps")
        if "seconds" in epoch:
            print(f"time              {epoch['seconds'] / 3600:,.2f} hours")
        if "price" in epoch:
            print(f"price             {epoch['price']:,.2f} {currency}".rstrip())
        if "kwh" in epoch:
            cost = f", {epoch['energy_price']:,.2f} {currency}".rstrip() if "energy_price" in epoch else ""
            print(f"energy            {epoch['kwh']:,.2f} kWh{cost}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    report = estimate(args)
    if args.json:
        print(json.dumps(report))
    else:
        show(report, args.currency)


if __name__ == "__main__":
    run_main(main)
