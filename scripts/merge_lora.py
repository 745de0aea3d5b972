"""Merges LoRA adapters into the weights they were trained on, takes them out again, exchanges them with peft.

    python scripts/merge_lora.py --lora identity --output out/merged_512.pth        a .pth like any other
    python scripts/merge_lora.py --lora identity,medical --output out/merged_hf     in this order, for transformers
    python scripts/merge_lora.py --output out/full_sft_hf                           only the weights, for transformers
    python scripts/merge_lora.py --unmerge --weight out/merged_512.pth --lora identity --output out/base_512.pth
    python scripts/merge_lora.py --lora identity --to_peft out/identity_peft        on top of the folder above
    python scripts/merge_lora.py --from_peft out/identity_peft --output out/lora_copy_512.pth

Reads   out/{weight}_{dim}[_moe].pth, out/lora_{name}_{dim}[_moe].pth with .json
Writes  --output: a .pth with .json, or a folder for transformers; --to_peft: adapter_config.json and
        adapter_model.safetensors
--low_mem reads, merges and writes one tensor at a time; a .pth then needs its own size on the disk once more.

把 LoRA 适配器合并进训练它时所用的权重（.pth 或 transformers 目录），也可以再减去，或与 peft 格式互相转换。
--low_mem 逐个张量地读取、合并、写出，省内存。
"""

import argparse
import json
import mmap
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from model.checkpoint import (  # noqa: E402
    atomic_write,
    check_base,
    file_sha256,
    find_adapters,
    find_weights,
    load_tensors,
    read_adapter,
    read_adapters,
    read_base,
    read_meta,
    read_state_dict,
    save_weights,
    tensor_key,
    versions,
)
from model.cli import ROOT, add_lora_flag, positive_int, run_main  # noqa: E402
from model.hf import from_peft, save_folder, to_peft, write_json, write_safetensors  # noqa: E402
from model.LMConfig import SIZES, LMConfig  # noqa: E402
from model.lora import LoRAConfig, merged_tensor  # noqa: E402
from model.tokenizer import Tokenizer, load_tokenizer  # noqa: E402

NOT_OURS = (".pt", ".bin", ".ckpt", ".safetensors")


class Mapped(Mapping):
    """The tensors of a .pth by v1's names, float32, each read from the disk when it is asked for.

    The file is mapped anew for every tensor: the pages of a mapping stay in memory as long as it does.
    Raises: ValueError when the file is damaged, or in the format of torch before 1.6, which cannot be mapped.
    """

    def __init__(self, path: Path):
        state = load_tensors(path, "meta")
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{path} is not a state dict; give a .pth that a training script wrote")
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is in torch's old format, which cannot be mapped; leave --low_mem out")
        self.path = path
        self.names = {tensor_key(name): name for name in state if "mask" not in name and tensor_key(name) != "pos_cis"}
        self.shapes = {name: state[own] for name, own in self.names.items()}  # on the meta device: no values

    def __getitem__(self, name: str) -> Tensor:
        return torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)[self.names[name]].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Merged(Mapping):
    """The tensors of a model with adapters merged in, in order, or with sign -1 taken out; computed when asked for."""

    def __init__(self, base: Mapping[str, Tensor], adapters: list[tuple[dict, LoRAConfig]], sign: int = 1):
        self.base, self.adapters, self.sign = base, adapters, sign

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.base[name]
        for adapter, lora in self.adapters:
            tensor = merged_tensor(name, tensor, adapter, lora.scale, self.sign)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def open_base(
    path: Path, tokenizer: Tokenizer, n_heads: int | None, low_mem: bool
) -> tuple[Mapping[str, Tensor], LMConfig, dict]:
    """State dict, configuration and metadata of the weights, checked; with low_mem the values stay on the disk."""
    if not low_mem:
        state, config, meta = read_base(path, tokenizer, n_heads)
        return state, config, meta or {}
    state = Mapped(path)
    config, meta = check_base(path, state.shapes, tokenizer, n_heads)
    return state, config, meta or {}


def adapter_to_take_out(file: Path, weights: Path, meta: dict) -> tuple[dict, LoRAConfig]:
    """Tensors and settings of the adapter that was merged into the weights last.

    It was checked against the model then, and the sha256 says that it is the same. Raises: ValueError if it is not.
    """
    merged = meta.get("merged")
    if not merged:
        raise ValueError(f"{weights} has no adapters to take out: its .json lists none that were merged")
    if (found := file_sha256(file)) != merged[-1]["sha256"]:
        raise ValueError(
            f"the adapter merged last into {weights} is {merged[-1]['file']} of sha256 {merged[-1]['sha256'][:16]}..., "
            f"but {file} has sha256 {found[:16]}...; take the last one out first"
        )
    about = read_meta(file)
    if about is None:
        raise ValueError(f"{file} lacks its .json, which says how it was scaled")
    return read_state_dict(file), LoRAConfig(**about["lora"])


def save_pth(path: Path, state: Mapping[str, Tensor], meta: dict, low_mem: bool) -> None:
    """Writes a .pth and its .json. With low_mem the tensors go to a temporary file, one at a time, and from there."""
    if not low_mem:
        whole = {name: state[name] for name in state if name != "output.weight"}
        save_weights(path, whole | {"output.weight": whole["tok_embeddings.weight"]}, meta)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent) as file:
        places = {}
        for name in state:
            if name != "output.weight":
                tensor = state[name]
                places[name] = file.tell(), tensor.shape
                file.write(tensor.contiguous().numpy())
        file.flush()
        values = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # stays open while a tensor points into it
        whole = {
            name: torch.frombuffer(values, dtype=torch.float32, count=shape.numel(), offset=start).view(shape)
            for name, (start, shape) in places.items()
        }
        save_weights(path, whole | {"output.weight": whole["tok_embeddings.weight"]}, meta)


def require_free(output: Path, used: list[Path], overwrite: bool) -> None:
    """Raises ValueError when the output is there already and may not be replaced."""
    if output.suffix in NOT_OURS:
        raise ValueError(f"--output {output}: end it in .pth for a file, or give a folder for transformers")
    if any(output.resolve() == path.resolve() for path in used):
        raise ValueError(f"--output {output} is one of the files to read; give another name")
    is_file = output.suffix == ".pth"
    if output.exists() and output.is_dir() == is_file:
        raise ValueError(f"--output {output} is a {'folder' if is_file else 'file'}; give another name")
    if not overwrite and (output.exists() if is_file else output.is_dir() and any(output.iterdir())):
        raise ValueError(f"{output} exists; add --overwrite to replace it")


def merge(args: argparse.Namespace, weights: Path, tokenizer: Tokenizer) -> None:
    """--output, with or without --unmerge."""
    base, config, meta = open_base(weights, tokenizer, args.n_heads, args.low_mem)
    files = find_adapters(args.lora, args.out_dir, config)
    output = Path(args.output)
    is_file = output.suffix == ".pth"
    require_free(output, [weights, *files], args.overwrite)
    about = {"merged": meta.get("merged", []), "base": meta.get("base")}
    if not about["merged"]:
        about["base"] = {"file": weights.name, "sha256": file_sha256(weights)}
    if args.unmerge:
        if len(files) != 1:
            raise ValueError("--unmerge takes one adapter out: give it as --lora")
        state = Merged(base, [adapter_to_take_out(files[0], weights, meta)], sign=-1)
        about["merged"] = about["merged"][:-1]
    else:
        if is_file and not files:
            raise ValueError("nothing to merge: give --lora, or as --output a folder, for the weights alone")
        adapters = read_adapters(files, weights, config, tokenizer)
        state = Merged(base, adapters)
        about["merged"] = [*about["merged"], *({"file": file.name, "sha256": file_sha256(file)} for file in files)]
    if is_file:
        about |= {"stage": "merged", "config": config.to_dict(), "tokenizer": tokenizer.fingerprint}
        save_pth(output, state, about | {"versions": versions()}, args.low_mem)
    else:
        save_folder(output, state, config, tokenizer)
    done = "without" if args.unmerge else "with"
    print(f"{weights.name} {done} {', '.join(file.name for file in files) or 'no adapter'}: {output}")


def export_peft(args: argparse.Namespace, weights: Path, tokenizer: Tokenizer) -> None:
    """--to_peft"""
    _, config, _ = open_base(weights, tokenizer, args.n_heads, low_mem=True)
    files = find_adapters(args.lora, args.out_dir, config)
    folder = Path(args.to_peft)
    if len(files) != 1:
        raise ValueError("--to_peft writes one adapter: give it as --lora")
    require_free(folder, files, args.overwrite)
    adapter, lora, _ = read_adapter(files[0], weights, config, tokenizer)
    values, tensors = to_peft(adapter, lora, config, args.base_folder)
    with atomic_write(folder / "adapter_model.safetensors") as file:
        write_safetensors(file, {name: value.shape for name, value in tensors.items()}, tensors.items())
    write_json(folder / "adapter_config.json", values)
    print(f"{files[0].name} for peft: {folder}")
    if values["lora_dropout"] != lora.dropout:
        print(f"lora_dropout is 0 instead of {lora.dropout}: peft allows none on routed experts")


def import_peft(args: argparse.Namespace, weights: Path, tokenizer: Tokenizer) -> None:
    """--from_peft"""
    _, config, _ = open_base(weights, tokenizer, args.n_heads, low_mem=True)
    folder, output = Path(args.from_peft), Path(args.output)
    if output.suffix != ".pth":
        raise ValueError(
            f"--output {output}: an adapter of ours is a .pth, e.g. out/lora_name_{config.name_suffix}.pth"
        )
    require_free(output, [weights], args.overwrite)
    try:
        values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder} holds no adapter of peft: {error}") from None
    state, lora = from_peft(values, tensors, config, str(folder))
    about = {
        "stage": output.stem.removesuffix(f"_{config.name_suffix}"),
        "config": config.to_dict(),
        "tokenizer": tokenizer.fingerprint,
        "lora": lora.to_dict(),
        "base": {"file": weights.name, "sha256": file_sha256(weights)},
        "versions": versions(),
    }
    save_weights(output, state, about)
    print(f"{folder} as an adapter of {weights.name}: {output}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lora_flag(parser)
    add("--weight", default="full_sft", help="the weights the adapters belong to: stage or file (default: full_sft)")
    add("--size", choices=SIZES, default="small", help="model size (default: small)")
    add("--output", help="FILE.pth, or a folder for transformers")
    add("--overwrite", action="store_true", help="replace what is at --output or --to_peft")
    add("--low_mem", action="store_true", help="one tensor in memory at a time")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--unmerge", action="store_true", help="take out the adapter that was merged last")
    mode.add_argument("--to_peft", metavar="DIR", help="write the adapter for peft, instead of merging it")
    mode.add_argument("--from_peft", metavar="DIR", help="write peft's adapter as one of ours to --output")
    add("--base_folder", default="", help="with --to_peft: the base model's folder, to be named in adapter_config.json")
    add("--n_heads", type=positive_int, help="query heads of weights without a .json (default: 16, as v1)")
    add("--out_dir", default=str(ROOT / "out"), help="folder of weights and adapters (default: out)")
    add(
        "--tokenizer_dir",
        default=str(ROOT / "model" / "minimind_tokenizer"),
        help="folder with tokenizer.json (default: model/minimind_tokenizer)",
    )
    args = parser.parse_args(argv)
    if bool(args.output) == bool(args.to_peft):
        raise ValueError(
            "say where to write: --output FILE.pth or FOLDER, or --to_peft FOLDER, which takes no --output"
        )
    if args.low_mem and (args.to_peft or args.from_peft):
        raise ValueError("--low_mem is for merging; an adapter is small")
    if args.from_peft and args.lora:
        raise ValueError("--from_peft makes an adapter of ours; it takes no --lora")
    if args.base_folder and not args.to_peft:
        raise ValueError("--base_folder is for --to_peft")
    weights = find_weights(args.weight, args.out_dir, args.size)
    tokenizer = load_tokenizer(args.tokenizer_dir)
    work = export_peft if args.to_peft else import_peft if args.from_peft else merge
    work(args, weights, tokenizer)


if __name__ == "__main__":
    run_main(main)
