"""Weights on disk: atomic writing, strict loading, resuming.

Beside `out/pretrain_512.pth` (a plain float32 state dict with v1's keys) stand `pretrain_512.json` (what the
weights are: configuration, tokenizer, arguments, losses, sha256) and, while a run can be continued,
`pretrain_512_resume.pth`. Everything is written to a temporary file and renamed, so a process killed at any
instant leaves the old file or the new one.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from model.LMConfig import SIZES, LMConfig
from model.lora import LoRAConfig, adapter_state, add_adapter, check_fit, load_adapter_state, merge_state
from model.model import Transformer
from model.tokenizer import Tokenizer

V1_HEADS = 16  # query heads of every released v1 model; the shapes of a state dict do not tell


@contextlib.contextmanager
def atomic_write(path: Path | str, mode: str = "wb") -> Iterator[IO]:
    """A file to write to that becomes `path` at the end of the block, whole, or not at all.

    Raises: OSError naming `path` when the disk is full or the folder cannot be written; `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every file system lets a folder be synced
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; the file is as it was before", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, stem: str) -> None:
    """Deletes temporary files that killed runs of this name left in the folder."""
    for path in folder.glob(f".{stem}*.tmp"):
        pid = path.name.rsplit(".", 2)[1]
        if pid.isdigit() and not is_running(int(pid)):
            path.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """True if there is a process of that number, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def write_tensors(value: Any, file: IO[bytes]) -> None:
    """torch.save, with the OSError of a full disk, which torch turns into something else."""
    keeper = _ErrorKeeper(file)
    try:
        torch.save(value, keeper)
    except RuntimeError:
        if keeper.error:
            raise keeper.error from None
        raise


class _ErrorKeeper(io.RawIOBase):
    """Passes writes on and remembers the error of one that failed."""

    def __init__(self, file: IO[bytes]):
        self.file, self.error = file, None

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tensors(path: Path, device: str | torch.device = "cpu") -> Any:
    """torch.load of tensors and plain values only: a pickle that would run code is refused.

    Raises: ValueError naming the file when it is damaged or not of this kind.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which could run code; it was not loaded"
        ) from None
    except Exception as error:  # damaged bytes may raise anything, IndexError and struct.error among others
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate" in str(error):
            raise
        raise ValueError(f"{path} is damaged or not a PyTorch file; copy or train it again") from None


def tensor_key(name: str) -> str:
    """v1's name of a weight: compiled and DDP-wrapped models add prefixes."""
    for prefix in ("_orig_mod.", "module."):
        name = name.replace(prefix, "")
    return name


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a .pth of ours or of v1 by v1's names, float32; without the masks that old files hold."""
    state = load_tensors(path)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a state dict; give a .pth that a training script wrote")
    state = {tensor_key(name): value.float() for name, value in state.items()}
    return {name: value for name, value in state.items() if "mask" not in name and name != "pos_cis"}


def config_from_shapes(path: Path, state: dict[str, torch.Tensor], n_heads: int = V1_HEADS) -> LMConfig:
    """The configuration that fits the weights of a file without a .json; n_heads cannot be seen in shapes."""
    try:
        vocab_size, dim = state["tok_embeddings.weight"].shape
        n_layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
        kv_dim = state["layers.0.attention.wk.weight"].shape[0]
        ffn = "layers.0.feed_forward."
        experts = [name for name in state if name.startswith(ffn + "experts.") and name.endswith("w1.weight")]
        hidden_dim = state[experts[0] if experts else ffn + "w1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not hold a MiniMind model: {error} is missing") from None
    if dim % n_heads or kv_dim % (dim // n_heads):
        raise ValueError(f"{path}: {n_heads} query heads do not divide width {dim}; give --n_heads")
    values = dict(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=kv_dim // (dim // n_heads),
        vocab_size=vocab_size,
        hidden_dim=hidden_dim,
    )
    if experts:
        shared = state.get(ffn + "shared_experts.w1.weight")
        values |= dict(
            use_moe=True,
            n_routed_experts=len(experts),
            n_shared_experts=0 if shared is None else shared.shape[0] // hidden_dim,
        )
    return LMConfig(**values)


def read_meta(path: Path) -> dict | None:
    """The .json beside a .pth, checked against its sha256; None for a file without one, such as v1's.

    The .json is written first and remembers what it replaced: a process killed between the two renames leaves
    new metadata beside old weights, and the old weights' own metadata is inside.
    """
    try:
        with open(path.with_suffix(".json"), encoding="utf-8") as file:
            meta = json.load(file)
        if not {"config", "tokenizer"} <= meta.keys():
            raise KeyError
        known = {meta["sha256"]: meta}
        if meta.get("previous"):
            known[meta["previous"]["sha256"]] = meta["previous"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path.with_suffix('.json')} is damaged; remove it to load the weights without it") from None
    found = known.get(file_sha256(path))
    if found is None:
        raise ValueError(
            f"{path} is not the file that {path.with_suffix('.json').name} describes (sha256 differs): it was "
            "truncated or changed; copy or train it again, or remove the .json to load it all the same"
        )
    return found


def load_model(
    path: Path | str,
    *,
    tokenizer: Tokenizer | None = None,
    n_heads: int | None = None,
    adapters: list[Path] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Transformer, dict]:
    """The model of a .pth in float32 and eval mode, and its metadata ({} for a v1 file).

    adapters: files of LoRA adapters that were trained on these weights, to be merged in, in this order.
    Raises: ValueError when the file is damaged, was changed since it was written, fits no configuration, or
    belongs to another tokenizer, or an adapter to other weights; FileNotFoundError.
    """
    path = Path(path)
    state, config, meta = read_base(path, tokenizer, n_heads)
    for adapter, lora in read_adapters(adapters or [], path, config, tokenizer):
        merge_state(state, adapter, lora.scale)
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(state, assign=True)
    model.output.weight = model.tok_embeddings.weight
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.to(device).eval(), meta or {}


def read_base(
    path: Path, tokenizer: Tokenizer | None = None, n_heads: int | None = None
) -> tuple[dict[str, torch.Tensor], LMConfig, dict | None]:
    """State dict, configuration and metadata of a whole model's .pth. Raises: as load_model."""
    state = read_state_dict(path)
    return state, *check_base(path, state, tokenizer, n_heads)


def check_base(
    path: Path, state: dict[str, torch.Tensor], tokenizer: Tokenizer | None, n_heads: int | None
) -> tuple[LMConfig, dict | None]:
    """Configuration and metadata of a whole model's .pth, whose tensors (or their shapes) are checked against them."""
    meta = read_meta(path)
    if meta and "lora" in meta:
        raise ValueError(f"{path} is an adapter; give it as --lora, and as weights the model that it was trained on")
    config = LMConfig.from_dict(meta["config"]) if meta else config_from_shapes(path, state, n_heads or V1_HEADS)
    if tokenizer is not None:
        check_tokenizer(path, config, meta, tokenizer)
    with torch.device("meta"):
        check_shapes(path, state, Transformer(config))
    return config, meta


def read_adapters(
    files: list[Path], base: Path, config: LMConfig, tokenizer: Tokenizer | None = None
) -> list[tuple[dict[str, torch.Tensor], LoRAConfig]]:
    """Tensors and settings of adapters that are to be merged in this order, checked as by read_adapter.

    Raises: ValueError too when one replaces a tensor as a whole that one before it changed: that would be lost.
    """
    changed: dict[str, Path] = {}
    adapters = []
    for file in files:
        adapter, lora, _ = read_adapter(file, base, config, tokenizer)
        weight_of = {name: name.replace(".lora_A.", ".").replace(".lora_B.", ".") for name in adapter}
        for name, weight in weight_of.items():
            if name == weight and weight in changed:
                raise ValueError(
                    f"{file} replaces {weight} as a whole, and what {changed[weight]} did to it would be lost; "
                    "merge only one of the two"
                )
        changed |= dict.fromkeys(weight_of.values(), file)
        adapters.append((adapter, lora))
    return adapters


def read_adapter(
    path: Path, base: Path, config: LMConfig, tokenizer: Tokenizer | None = None
) -> tuple[dict[str, torch.Tensor], LoRAConfig, dict]:
    """An adapter's tensors, settings and metadata, checked to be made for the weights in `base`.

    Raises: ValueError when it is for another size, tokenizer or base, is empty, or holds other tensors than it should.
    """
    state = read_state_dict(path)
    meta = read_meta(path)
    if meta is None or "lora" not in meta:
        raise ValueError(
            f"{path} is no adapter: there is no {path.with_suffix('.json').name} that says what it changes"
        )
    theirs = LMConfig.from_dict(meta["config"])
    for name, value in theirs.to_dict().items():
        if name != "max_seq_len" and value != getattr(config, name):
            raise ValueError(f"{path} is for a model with {name}={value}, {base} has {getattr(config, name)}")
    if tokenizer is not None:
        check_tokenizer(path, theirs, meta, tokenizer)
    lora = LoRAConfig(**meta["lora"])
    with torch.device("meta"):
        model = Transformer(config)
        add_adapter(model, lora)
    check_fit({name: value.shape for name, value in adapter_state(model).items()}, state, str(path))
    if (found := file_sha256(base)) != meta["base"]["sha256"]:
        raise ValueError(
            f"{path} was trained on {meta['base']['file']} of sha256 {meta['base']['sha256'][:16]}..., but {base} has "
            f"sha256 {found[:16]}...; give the weights it was trained on, or train it again on these"
        )
    return state, lora, meta


def find_adapters(names: str | None, out_dir: Path | str, size: str | LMConfig) -> list[Path]:
    """The files meant by `--lora NAME[,NAME]`: names in out_dir, or paths. Raises: ValueError listing those there."""
    config = LMConfig.from_size(size) if isinstance(size, str) else size
    paths = []
    for name in filter(None, (names or "").split(",")):
        candidates = [Path(name), weights_path(out_dir, f"lora_{name.removeprefix('lora_')}", config)]
        found = [path for path in candidates if path.is_file()]
        if not found:
            files = sorted(Path(out_dir).glob("lora_*.pth"))
            there = ", ".join(path.name for path in files if not path.stem.endswith(("_resume", "_ref")))
            raise ValueError(f"no adapter {name!r}: {candidates[1]} does not exist; there are: {there or 'none'}")
        paths.append(found[0])
    return paths


def check_tokenizer(path: Path, config: LMConfig, meta: dict | None, tokenizer: Tokenizer) -> None:
    if config.vocab_size == 32000 and tokenizer.vocab_size != 32000:
        raise ValueError(
            f"{path} has 32000 tokens: MiniMind before 2024-09-17, with a tokenizer of that time; not usable"
        )
    if config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{path} has {config.vocab_size} tokens, the tokenizer in {tokenizer.directory} {tokenizer.vocab_size}; "
            "give the --tokenizer_dir the model was trained with"
        )
    if meta and meta["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(
            f"{path} was trained with another tokenizer ({meta['tokenizer'][:12]}) than the one in "
            f"{tokenizer.directory} ({tokenizer.fingerprint[:12]}); give its --tokenizer_dir"
        )


def check_shapes(path: Path, state: dict[str, torch.Tensor], model: Transformer) -> None:
    """Raises ValueError unless names and shapes are those of the model; says the first that differs."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(wanted.keys() | state.keys()):
        have = tuple(state[name].shape) if name in state else "missing"
        if have != wanted.get(name):
            raise ValueError(f"{path}: {name} is {have}, the model's is {wanted.get(name, 'not there')}; another size?")


def weights_path(out_dir: Path | str, stage: str, config: LMConfig) -> Path:
    """out/{stage}_{dim}[_moe].pth"""
    return Path(out_dir) / f"{stage}_{config.name_suffix}.pth"


def find_weights(name_or_path: str, out_dir: Path | str, size: str) -> Path:
    """The file meant by a path, by a stage's name with the size, or by a file name in out_dir.

    Raises: ValueError that lists the weights there are.
    """
    out_dir = Path(out_dir)
    candidates = [
        Path(name_or_path),
        weights_path(out_dir, name_or_path, LMConfig.from_size(size)),
        out_dir / f"{name_or_path.removesuffix('.pth')}.pth",
    ]
    for path in candidates:
        if path.is_file():
            return path
    there = sorted(path.name for path in out_dir.glob("*.pth") if not path.stem.endswith(("_resume", "_ref")))
    sizes = ", ".join(f"{name} {LMConfig.from_size(name).name_suffix}" for name in SIZES)
    hint = (
        f"; in {out_dir} there are: {', '.join(there)} (sizes: {sizes})"
        if there
        else "; train them: 1-pretrain.py, then 3-full_sft.py"
    )
    raise ValueError(f"no weights {name_or_path!r} of size {size}: {candidates[1]} does not exist{hint}")


class Checkpoint:
    """Writes and resumes the files of one training run: weights, metadata, resume file.

    model: the Transformer itself, before `run.wrap`. adapter: for LoRA, its settings and the base weights' file;
    then only the trained tensors are written. objective: what else decides the loss, and must not change on resume.
    """

    def __init__(
        self,
        run,
        stage: str,
        model: Transformer,
        optimizer,
        tokenizer: Tokenizer,
        plan,
        args,
        adapter: tuple[LoRAConfig, Path] | None = None,
        objective: dict | None = None,
    ):
        self.run, self.model, self.optimizer, self.plan = run, model, optimizer, plan
        self.path = weights_path(args.out_dir, stage, model.config)
        self.resume_path = self.path.with_name(f"{self.path.stem}_resume.pth")
        self.log_path = self.path.with_suffix(".jsonl")
        self.about = {
            "stage": stage,
            "config": model.config.to_dict(),
            "tokenizer": tokenizer.fingerprint,
            "args": vars(args),
            "data": plan.data.stats,
            "versions": versions(),
        }
        # what must be the same for a resumed run to end where an uninterrupted one does
        self.identity = plan.identity() | {
            "tokenizer": tokenizer.fingerprint,
            "optimizer": args.optimizer,
            "weight_decay": args.weight_decay,  # kept in the optimizer's state: a new value would be ignored
            "dtype": str(run.dtype),
            "cross_documents": getattr(args, "cross_documents", None),
        }
        self.identity |= {f"model {name}": value for name, value in model.config.to_dict().items()}
        self.identity |= objective or {}
        self.names = None  # of the tensors that are written; None: all
        if adapter:
            lora, base = adapter
            self.about |= {"lora": lora.to_dict(), "base": {"file": base.name, "sha256": file_sha256(base)}}
            self.identity |= {f"adapter's {name}": value for name, value in lora.to_dict().items()}
            self.identity["base weights"] = self.about["base"]["sha256"]
            self.names = set(adapter_state(model))
        self.saved_step: int | None = None

    def start(self, resume: bool) -> int:
        """The step to start from: 0, or with `resume` the one the resume file was written after, loaded.

        To be called before `run.wrap`, which gives every rank its share of what is loaded here.
        Raises: ValueError when the resume file belongs to another run: other data, batch, seed, or model.
        """
        self.run.require_same(json.dumps(self.identity), "what is to be trained")
        step = self._load() if resume and self.resume_path.exists() else 0
        self.run.require_same(str(step), f"the step of {self.resume_path.name}")
        if resume and not step:
            self.run.print(f"nothing to resume: {self.resume_path} does not exist; starting at step 0")
        elif not resume and self.path.exists():
            self.run.print(f"{self.path} will be replaced at the first save")
        return step

    def _load(self) -> int:
        saved = load_tensors(self.resume_path)
        if not isinstance(saved, dict) or not isinstance(saved.get("identity"), dict):
            raise ValueError(f"{self.resume_path} is no resume file; remove it, or start anew without --resume")
        for name, now in self.identity.items():
            before = saved["identity"].get(name)
            if before != now:
                what = "give what it was"
                if name == "rows_per_step":
                    what = f"--batch_size x --accumulation_steps x {self.run.world_size} process(es) must be {before}"
                raise ValueError(
                    f"cannot resume {self.resume_path}: {name} was {before}, now it is {now}; "
                    f"{what}, or start anew without --resume"
                )
        if self.names is None:
            check_shapes(self.resume_path, saved["model"], self.model)
            self.model.load_state_dict(saved["model"])
        else:
            load_adapter_state(self.model, saved["model"], str(self.resume_path))
        self.run.parallel.load_optimizer(self.optimizer, saved["optimizer"])
        self.run.parallel.scaler.load_state_dict(saved["scaler"])
        self.run.set_rng_states(saved["rng"])
        self.saved_step = saved["step"]
        processes = "" if len(saved["rng"]) == self.run.world_size else f", saved by {len(saved['rng'])} process(es)"
        self.run.print(f"resuming {self.resume_path} after step {saved['step']} of {self.plan.total_steps}{processes}")
        return self.saved_step

    def save(self, step: int, figures: dict) -> None:
        """Writes all files after `step` steps; `figures` (losses) go into the metadata. Does nothing if done before.

        Every rank must call, rank 0 writes. The resume file holds the weights too: it is whole by itself, wherever a
        kill leaves the other two.
        """
        if step == self.saved_step:
            return
        state = self.run.parallel.weights(self.model, self.names)
        resume = {
            "model": state,
            "optimizer": self.run.parallel.optimizer_state(),
            "scaler": self.run.parallel.scaler.state_dict(),
            "rng": self.run.rng_states(),
            "step": step,
            "identity": self.identity,
        }
        if self.run.is_main:
            if self.names is None:
                state["output.weight"] = state["tok_embeddings.weight"]
            remove_leftovers(self.path.parent, self.path.stem)
            with atomic_write(self.resume_path) as file:
                write_tensors(resume, file)
            progress = {"step": step, "total_steps": self.plan.total_steps, "finished": step >= self.plan.total_steps}
            save_weights(self.path, state, self.about | progress | figures)
        self.run.barrier()
        self.saved_step = step


def save_weights(path: Path, state: dict[str, torch.Tensor], meta: dict) -> None:
    """Writes a state dict and its metadata; see read_meta for what a kill between the two leaves."""
    with atomic_write(path) as file:
        write_tensors(state, file)
        file.flush()
        try:
            old = read_meta(path) if path.exists() else None
        except ValueError:  # the old file is damaged, and about to go
            old = None
        previous = {key: value for key, value in old.items() if key != "previous"} if old else None
        meta = meta | {"sha256": file_sha256(Path(file.name)), "previous": previous}
        with atomic_write(path.with_suffix(".json"), "w") as meta_file:
            json.dump(meta, meta_file, ensure_ascii=False, indent=1)


def versions() -> dict[str, str]:
    """What the figures of a run depend on besides its arguments."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "machine": platform.machine()}
