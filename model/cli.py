"""What the command lines of all scripts share: paths, value checks, and how an error is shown."""

import argparse
import ast
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # default paths start here, so a script runs from any folder


def run_main(main: Callable[[], int | None]) -> None:
    """Runs `main`; a mistake of the user becomes one line on stderr and exit code 2, no traceback.

    ValueError, OSError and running out of memory are the user's (a wrong value, a missing file, a full disk);
    anything else is a fault of ours and keeps its traceback. MINIMIND_DEBUG=1 shows the traceback in every case.
    Of several processes on a machine the first one speaks first: mostly all have the same to say. When one of them
    ends, the others say so and end too.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        out_of_memory = (
            isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate" in str(error)
        )
        lost = not out_of_memory and isinstance(error, RuntimeError) and lost_process(error)
        if os.environ.get("MINIMIND_DEBUG") or (isinstance(error, RuntimeError) and not out_of_memory and not lost):
            raise
        text = one_line(error)
        if lost:
            text = (
                f"rank {os.environ['RANK']}: another process of this run has ended ({text[:300]}); if it said nothing, "
                "it was killed or had no memory left. The last save is whole: add --resume to continue"
            )
        elif os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)  # if the first process has the same to say, the launcher ends this one meanwhile
            text = f"rank {os.environ['RANK']}: {text}"
        if out_of_memory:
            text = f"out of memory ({text[:120]}); use a smaller --batch_size or --max_seq_len, or --grad_checkpoint"
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


def lost_process(error: RuntimeError) -> bool:
    """True for what gloo and nccl raise in a process when another one of the run is gone."""
    signs = "connection (closed|reset)|socket closed|remote process exited|broken pipe|timed ?out|ncclRemoteError"
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and re.search(signs, str(error), re.IGNORECASE) is not None


def one_line(error: BaseException) -> str:
    """The message of an exception on a single line, with the file name of an OSError."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def number(kind: type, low: float | None = None, high: float | None = None, *, above: bool = False):
    """An argparse type: an int or float within [low, high]; with `above`, strictly greater than low."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if value != value or (low is not None and (value < low or (above and value == low))):
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if above else 'at least'} {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} must be at most {high}")
        return value

    return parse


positive_int = number(int, 1)
non_negative_int = number(int, 0)
positive_float = number(float, 0, above=True)
non_negative_float = number(float, 0)


def overrides(pairs: list[str]) -> dict:
    """`["dim=384", "use_moe=True"]` as a dict; ValueError says which pair is wrong."""
    values = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            sign = ""
        if not sign:
            raise ValueError(f"--override {pair}: write name=value with a number, True or False")
    return values


def add_place_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every script that runs a model: where and in which number format."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="number format of the products; auto: bfloat16 where the hardware computes it (default: auto)",
    )
    parser.add_argument("--seed", type=non_negative_int, default=1337, help="of all random numbers (default: 1337)")
    parser.add_argument(
        "--tokenizer_dir",
        default=str(ROOT / "model" / "minimind_tokenizer"),
        help="folder with tokenizer.json (default: model/minimind_tokenizer)",
    )
    parser.add_argument("--out_dir", default=str(ROOT / "out"), help="folder of the weights (default: out)")


def add_lora_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of every script that runs trained weights: adapters on top of them."""
    parser.add_argument(
        "--lora", metavar="NAME[,NAME]", help="adapters trained on these weights, merged in, in order: names or files"
    )


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the stages that train an adapter."""
    add = parser.add_argument
    add("--rank", type=positive_int, default=8, help="r: A is r x in, B is out x r (default: 8)")
    add("--alpha", type=positive_float, default=16, help="the addition is alpha / rank * B A (default: 16)")
    add(
        "--dropout",
        type=number(float, 0, 0.99),
        default=0.0,
        help="probability of leaving an input of A out, in training (default: 0)",
    )
    add(
        "--target",
        type=names,
        default="wq,wk,wv,wo,w1,w2,w3",
        help="matrices with an addition, by any part of their names: also attention, feed_forward, experts, "
        "shared_experts, all (default: wq,wk,wv,wo,w1,w2,w3, in every expert too)",
    )
    add(
        "--modules_to_save",
        type=names,
        default="",
        help="modules trained whole, e.g. tok_embeddings,output, which are one tensor (default: none)",
    )


def add_general_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of the stages after full fine-tuning, which can make a model forget what that taught."""
    parser.add_argument(
        "--general_path",
        help="held-out general instructions whose loss is measured before and after; '' for none (default: "
        "dataset/general_val.csv, if it is there)",
    )


def adapter_name(text: str) -> str:
    """An argparse type: a name that can be part of a file name and of a list."""
    if not re.fullmatch(r"[\w.-]+", text) or text.startswith("lora_"):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits, _ . - only, and not lora_ first, which is added")
    return text


def names(text: str) -> tuple[str, ...]:
    """An argparse type: the words between commas."""
    return tuple(filter(None, (word.strip() for word in text.split(","))))


def add_training_flags(
    parser: argparse.ArgumentParser,
    *,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    data: str,
    wandb_project: str,
    weight_decay: float = 0.1,
) -> None:
    """Flags of every training stage; v1's names where v1 had them. `data`: the file under dataset/ read by default."""
    add_place_flags(parser)
    add = parser.add_argument
    add("--data_path", default=str(ROOT / "dataset" / data), help=f"training data (default: dataset/{data})")
    add(
        "--val_path",
        help="held-out data; '' for none (default: X_val.csv beside the training data X_data.csv, if it is there)",
    )
    add(
        "--val_interval",
        type=non_negative_int,
        default=0,
        help="steps between held-out measurements; 0: at the end only (default: 0)",
    )
    add("--epochs", type=positive_int, default=epochs, help=f"passes over the data (default: {epochs})")
    add(
        "--max_steps",
        type=non_negative_int,
        default=0,
        help="stop after this many optimizer steps; 0: after the epochs (default: 0)",
    )
    add(
        "--batch_size",
        type=positive_int,
        default=batch_size,
        help=f"rows of a micro-batch on one device (default: {batch_size})",
    )
    add("--accumulation_steps", type=positive_int, default=1, help="micro-batches of one optimizer step (default: 1)")
    add("--max_seq_len", type=number(int, 8), default=512, help="tokens of a row (default: 512)")
    add(
        "--learning_rate",
        type=positive_float,
        default=learning_rate,
        help=f"peak, after warm-up (default: {learning_rate:g})",
    )
    add(
        "--warmup_steps",
        "--warmup_iters",
        type=non_negative_int,
        help="optimizer steps of linear warm-up (default: 3%% of all steps)",
    )
    add(
        "--optimizer",
        choices=["adamw", "muon"],
        default="adamw",
        help="muon: for the matrices, adamw for the rest (default: adamw)",
    )
    add(
        "--weight_decay",
        type=non_negative_float,
        default=weight_decay,
        help=f"of matrices (default: {weight_decay:g})",
    )
    add(
        "--grad_clip",
        type=non_negative_float,
        default=1.0,
        help="largest norm of the gradient; 0: no clipping (default: 1.0)",
    )
    add("--grad_checkpoint", action="store_true", help="less memory for activations, about a third more time")
    add("--compile", action="store_true", help="torch.compile the model; needs a C++ compiler on CPU")
    add(
        "--num_workers",
        type=non_negative_int,
        help="cores that tokenize the data at the first run; 0: all (default: all)",
    )
    add("--log_interval", type=positive_int, default=100, help="optimizer steps between log lines (default: 100)")
    add(
        "--save_interval",
        type=positive_int,
        default=1000,
        help="optimizer steps between saves; the end is always saved (default: 1000)",
    )
    add(
        "--fsdp",
        action="store_true",
        help="under torchrun: every process keeps a share of weights, gradients and optimizer state (FSDP2)",
    )
    add("--cpu_offload", action="store_true", help="with --fsdp: keep the shares in the CPU's memory")
    add(
        "--deepspeed",
        nargs="?",
        const="zero2",
        metavar="CONFIG",
        help="under torchrun or deepspeed: ZeRO as a JSON file says, or zero1, zero2, zero3 for those in scripts/ "
        "(without a word, and under the deepspeed launcher: zero2)",
    )
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    add("--resume", action="store_true", help="continue an interrupted run from its last save")
    add("--use_wandb", action="store_true", help="log to Weights & Biases too; WANDB_MODE=offline works")
    add("--wandb_project", default=wandb_project, help=f"(default: {wandb_project})")
    add("--wandb_run_name", help="(default: file name, batch size and learning rate)")


def resolve_val_path(args: argparse.Namespace) -> str | None:
    """The held-out file to use: the one given, else X_val beside the training data X_data or X, if it exists.

    Beside train_data, as v1 called its preference pairs, it is val_data.
    """
    if args.val_path is None:
        data = Path(args.data_path)
        name, dot, endings = data.name.partition(".")
        held_out = "val_data" if name == "train_data" else name.removesuffix("_data") + "_val"
        beside = data.with_name(held_out + dot + endings)
        return str(beside) if beside.exists() else None
    return args.val_path or None


def if_there(path: str | None, default: str) -> str | None:
    """The path given; if none was, the file under dataset/ of that name, if it exists; '' is none."""
    if path is None:
        default_path = ROOT / "dataset" / default
        return str(default_path) if default_path.exists() else None
    return path or None
