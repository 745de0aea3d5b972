"""Our weights in Hugging Face's formats, and back: model folders for transformers, adapter folders for peft.

A dense model is a stock LlamaForCausalLM, a MoE model a stock Qwen2MoeForCausalLM, with the same logits. Three things
differ besides the names:

- Rotary positions: ours turn neighbouring channels (2i, 2i+1) of a head, theirs channels (i, i + C/2). The rows of wq
  and wk are put in that order.
- Qwen2Moe multiplies the shared expert by sigmoid(gate x). The gate is all zeros, which makes 1/2, and the shared
  w2 is doubled.
- Qwen2Moe has biases on queries, keys and values: zeros. Without a shared expert, that is zeros too.

Shape letters as in model.py; r is an adapter's rank.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from torch import Tensor, nn

from model.checkpoint import atomic_write
from model.LMConfig import LMConfig
from model.lora import TIED, LoRAConfig, adapter_state, add_adapter, check_fit
from model.model import Transformer
from model.tokenizer import Tokenizer, tokenizer_config

WORDS = {  # ours: theirs, for the words between the dots of a name; other words are the same
    "tok_embeddings": "embed_tokens",
    "output": "lm_head",
    "attention": "self_attn",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "shared_experts": "shared_expert",
}
OUR_WORDS = {theirs: ours for ours, theirs in WORDS.items()}
PEFT = "base_model.model."  # what peft puts before the name of every tensor
LORA = ("lora_A.weight", "lora_B.weight")
STACKS = ("gate_up_proj", "down_proj")  # the routed experts of a layer in transformers: w1 over w3, and w2


def hf_name(name: str) -> str:
    """Their name of a weight or module of ours: layers.0.attention.wq -> model.layers.0.self_attn.q_proj."""
    name = ".".join(WORDS.get(word, word) for word in name.split("."))
    return name if name.startswith("lm_head") else f"model.{name}"


def our_name(name: str) -> str:
    """Our name of a weight or module of theirs, the reverse of hf_name."""
    return ".".join(OUR_WORDS.get(word, word) for word in name.removeprefix("model.").split("."))


def hf_value(module: str, value: Tensor, config: LMConfig, back: bool = False) -> Tensor:
    """A matrix whose rows are the outputs of a module of ours, as theirs has it; with `back` the reverse. Exact.

    Shapes: value (out, n): a weight, or an adapter's B.
    """
    if module.endswith((".wq", ".wk")):
        half = config.head_dim // 2
        return value.unflatten(0, (-1, 2, half) if back else (-1, half, 2)).transpose(1, 2).flatten(0, 2)
    if module.endswith("shared_experts.w2"):
        return value * (0.5 if back else 2)
    return value


def hf_tensors(name: str, tensor: Tensor, config: LMConfig) -> dict[str, Tensor]:
    """What becomes of one tensor of a state dict: their name and value; nothing of the tied output.weight."""
    if name == "output.weight":
        return {}
    return {hf_name(name): hf_value(name.removesuffix(".weight"), tensor, config)}


def hf_constants(config: LMConfig) -> dict[str, Tensor]:
    """The tensors that theirs has and ours does not, all zeros; none for a dense model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config.n_layers if config.use_moe else 0):
        for part, heads in (("q", config.n_heads), ("k", config.n_kv_heads), ("v", config.n_kv_heads)):
            shapes[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = (heads * config.head_dim,)
        shared = f"model.layers.{layer}.mlp.shared_expert"
        shapes[f"{shared}_gate.weight"] = (1, config.dim)
        if not config.n_shared_experts:
            shapes[f"{shared}.gate_proj.weight"] = shapes[f"{shared}.up_proj.weight"] = (config.ffn_dim, config.dim)
            shapes[f"{shared}.down_proj.weight"] = (config.dim, config.ffn_dim)
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def hf_config(config: LMConfig) -> dict:
    """The content of config.json."""
    values = {
        "architectures": ["Qwen2MoeForCausalLM" if config.use_moe else "LlamaForCausalLM"],
        "model_type": "qwen2_moe" if config.use_moe else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": Tokenizer.bos_id,
        "eos_token_id": Tokenizer.eos_id,
        "torch_dtype": "float32",  # read by transformers 4, dtype by 5
        "dtype": "float32",
    }
    if not config.use_moe:
        return values | {"attention_bias": False, "mlp_bias": False}
    return values | {
        "num_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob and config.num_experts_per_tok > 1,  # as MoE.forward has it
        "moe_intermediate_size": config.ffn_dim,
        "shared_expert_intermediate_size": config.ffn_dim * max(1, config.n_shared_experts),
        "decoder_sparse_step": 1,  # every layer is a mixture
        "mlp_only_layers": [],
        "qkv_bias": True,
        "router_aux_loss_coef": config.aux_loss_alpha,
        "use_sliding_window": False,
    }


def save_folder(folder: Path, state: Mapping[str, Tensor], config: LMConfig, tokenizer: Tokenizer) -> None:
    """Writes a folder for AutoModelForCausalLM and AutoTokenizer: weights in float32, configuration, tokenizer.

    state: our names to tensors; each is asked for once and written before the next, so they need not all be in memory.
    Files that are there are replaced. config.json comes last: a folder that is half written does not load.
    """
    with torch.device("meta"):
        ours = Transformer(config).state_dict()
        wanted = [item for name, value in ours.items() for item in hf_tensors(name, value, config).items()]
        shapes = {name: value.shape for name, value in [*wanted, *hf_constants(config).items()]}

    def tensors() -> Iterable[tuple[str, Tensor]]:
        for name in ours:
            if name != "output.weight":
                yield from hf_tensors(name, state[name], config).items()
        yield from hf_constants(config).items()

    generation = {"bos_token_id": Tokenizer.bos_id, "eos_token_id": Tokenizer.eos_id, "use_cache": True}
    (folder / "config.json").unlink(missing_ok=True)
    with atomic_write(folder / "model.safetensors") as file:
        write_safetensors(file, shapes, tensors())
    with atomic_write(folder / "tokenizer.json") as file:
        file.write((tokenizer.directory / "tokenizer.json").read_bytes())
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", hf_config(config))


def write_json(path: Path, values: dict) -> None:
    with atomic_write(path, "w") as file:
        json.dump(values, file, ensure_ascii=False, indent=2)


def write_safetensors(file: IO[bytes], shapes: Mapping[str, torch.Size], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes a .safetensors file in float32, a tensor at a time: the library would want them all at once.

    shapes: of all tensors, in the order in which they come.
    Source: https://huggingface.co/docs/safetensors, "Format": 8 bytes length of the header, the header, the values.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values start at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for wanted, (name, tensor) in zip(shapes, tensors, strict=True):
        assert name == wanted and tensor.shape == shapes[name], (name, wanted, tensor.shape)
        file.write(tensor.detach().float().contiguous().numpy())


def load_folder(directory: Path | str) -> tuple[dict[str, Tensor], LMConfig, Path]:
    """(state dict by our names in float32, configuration, tokenizer's folder) of a folder as save_folder writes it.

    Other folders of a Llama or Qwen2Moe model will do if ours computes exactly the same. Only .safetensors and .json
    are read, nothing is executed. The tokenizer is not looked at: load_tokenizer tells whether it can be used.
    Raises: ValueError naming the file, and the setting or tensor that ours does not have.
    """
    folder = Path(directory)
    values = _read_json(folder / "config.json")
    config = our_config(values, folder / "config.json")
    tensors = _read_safetensors(folder)
    shared = [value for name, value in tensors.items() if ".shared_expert." in name]
    is_without = config.use_moe and config.n_shared_experts == 1 and not any(value.any() for value in shared)
    if is_without:  # hf_constants made zeros of it
        config = replace(config, n_shared_experts=0)

    embeddings, output = tensors.get("model.embed_tokens.weight"), tensors.pop("lm_head.weight", None)
    if output is None and not values.get("tie_word_embeddings"):
        raise ValueError(f"{folder}: lm_head.weight is missing, and tie_word_embeddings is not true in config.json")
    if output is not None and embeddings is not None and not torch.equal(output, embeddings):
        raise ValueError(f"{folder}: lm_head.weight is not embed_tokens.weight; they are one tensor here")
    with torch.device("meta"):
        ours = Transformer(config).state_dict()
    wanted = {hf_name(name): value for name, value in ours.items() if name != "output.weight"}
    constants = hf_constants(config)
    theirs = wanted | constants
    for name in sorted(theirs.keys() | tensors.keys()):
        have = tuple(tensors[name].shape) if name in tensors else "missing"
        need = tuple(theirs[name].shape) if name in theirs else "not there"
        if have != need:
            raise ValueError(f"{folder}: {name} is {have}, in a model of this config.json it is {need}")
        if name in constants and tensors[name].any():
            raise ValueError(f"{folder}: {name} is not all zeros; this toolkit's model does not have it")
    state = {}
    for name in ours:
        if name != "output.weight":
            value = tensors.pop(hf_name(name)).float()
            state[name] = hf_value(name.removesuffix(".weight"), value, config, back=True)
        else:
            state[name] = state["tok_embeddings.weight"]
    return state, config, folder


def our_config(values: dict, file: Path) -> LMConfig:
    """The configuration of a model of ours that computes what this config.json says, the reverse of hf_config.

    file: where it came from, for messages.
    Raises: ValueError naming the setting that ours does not have.
    """
    kind = values.get("model_type")
    if kind not in ("llama", "qwen2_moe"):
        raise ValueError(f"{file} has model_type {kind!r}; this toolkit's models are llama or qwen2_moe")
    use_moe = kind == "qwen2_moe"
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}  # transformers 5 and 4
    if not isinstance(rope, dict):
        raise ValueError(f"{file} has rope_scaling={rope!r}; it must be an object")
    found = {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
    }  # theirs, where it is left out
    found |= {"num_key_value_heads": values.get("num_attention_heads"), "router_aux_loss_coef": 0.001}
    found |= {name: value for name, value in (values | rope).items() if value is not None}
    numbers = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"]
    numbers += ["max_position_embeddings", "moe_intermediate_size" if use_moe else "intermediate_size"]
    numbers += ["num_experts", "num_experts_per_tok", "shared_expert_intermediate_size"] if use_moe else []
    for name in numbers:
        if type(found.get(name)) is not int or found[name] < 1:
            raise ValueError(f"{file} has {name}={found.get(name)!r}; it must be a whole number, at least 1")
    for name in ("rms_norm_eps", "rope_theta", "router_aux_loss_coef"):
        if type(found[name]) not in (int, float):
            raise ValueError(f"{file} has {name}={found[name]!r}; it must be a number")
    only = {  # what ours can be; the same if the setting is left out
        "hidden_act": "silu",
        "head_dim": found["hidden_size"] // found["num_attention_heads"],
        "rope_type": "default",
        "type": "default",  # rope_type in older files
        "partial_rotary_factor": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window" if use_moe else "sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "quantization_config": {},
    }
    for name, value in only.items():
        if found.get(name, value) != value:
            raise ValueError(f"{file} has {name}={found[name]!r}; this toolkit's models have {value!r}")
    numbers_of_moe = {}
    if use_moe:
        n_shared, rest = divmod(found["shared_expert_intermediate_size"], found["moe_intermediate_size"])
        if rest:
            raise ValueError(
                f"{file} has shared_expert_intermediate_size={found['shared_expert_intermediate_size']}; it must be "
                f"a multiple of moe_intermediate_size={found['moe_intermediate_size']}"
            )
        numbers_of_moe = dict(
            use_moe=True,
            num_experts_per_tok=found["num_experts_per_tok"],
            n_routed_experts=found["num_experts"],
            n_shared_experts=n_shared,
            norm_topk_prob=bool(found.get("norm_topk_prob")),
            aux_loss_alpha=found["router_aux_loss_coef"],
        )
    try:
        return LMConfig(
            dim=found["hidden_size"],
            n_layers=found["num_hidden_layers"],
            n_heads=found["num_attention_heads"],
            n_kv_heads=found["num_key_value_heads"],
            vocab_size=found["vocab_size"],
            hidden_dim=found["moe_intermediate_size" if use_moe else "intermediate_size"],
            norm_eps=found["rms_norm_eps"],
            max_seq_len=found["max_position_embeddings"],
            rope_theta=found["rope_theta"],
            **numbers_of_moe,
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file} does not exist; give the folder of a model as save_pretrained writes it") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{file} is damaged: it does not hold a JSON object")
    return values


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by their names there, from model.safetensors or from the files of its index."""
    if (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif (folder / "model.safetensors.index.json").is_file():
        index = _read_json(folder / "model.safetensors.index.json").get("weight_map")
        names = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{folder / 'model.safetensors.index.json'} is damaged: its weight_map names no files")
    else:
        pickled = "; .bin files are not read, they can run programs" if list(folder.glob("*.bin")) else ""
        raise ValueError(f"{folder / 'model.safetensors'} does not exist{pickled}; save the model as safetensors")
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= safetensors.torch.load_file(folder / name)
        except FileNotFoundError:
            raise ValueError(f"{folder / name} does not exist, though the index names it") from None
        except (safetensors.SafetensorError, ValueError) as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from None
    for name, value in tensors.items():
        if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{folder}: {name} is of type {str(value.dtype)[6:]}; only float32, float16, bfloat16 are read"
            )
    # Old files of Llama hold the rotary frequencies too, which follow from rope_theta.
    return {name: value for name, value in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}


# peft's adapters


def to_peft(
    adapter: dict[str, Tensor], lora: LoRAConfig, config: LMConfig, base_folder: str = ""
) -> tuple[dict, dict[str, Tensor]]:
    """An adapter as peft has it: the content of adapter_config.json, and the tensors by peft's names.

    transformers keeps the routed experts of a layer in two stacked tensors, gate_up_proj (w1 over w3) and down_proj.
    peft adapts these as target_parameters, which allow no dropout: it is written as 0.
    base_folder: the folder of the base model, for tools that look it up in adapter_config.json.
    Raises: ValueError naming the routed experts' targets that peft cannot express.
    """
    tensors: dict[str, Tensor] = {}
    low_rank = [name.removesuffix(f".{LORA[0]}") for name in adapter if name.endswith(LORA[0])]
    whole = [name.removesuffix(".weight") for name in adapter if not name.endswith(LORA)]
    for module in whole:
        if ".experts." in module:
            raise ValueError(f"peft cannot replace a single expert as a whole: {module}; merge the adapter instead")
    routed = [module for module in low_rank if ".experts." in module]
    linear = [module for module in low_rank if ".experts." not in module]
    for module in linear:
        a, b = (adapter[f"{module}.{part}"] for part in LORA)
        tensors[f"{PEFT}{hf_name(module)}.{LORA[0]}"] = a
        tensors[f"{PEFT}{hf_name(module)}.{LORA[1]}"] = hf_value(module, b, config)
    stacks: list[str] = []
    for layer in range(config.n_layers if routed else 0):
        stacks += _stack_experts(layer, adapter, config, tensors)
    if "tok_embeddings" in whole:
        whole.append("output")
    constants = hf_constants(config)
    for module in whole:
        value = adapter["tok_embeddings.weight" if module in TIED else f"{module}.weight"]
        tensors[f"{PEFT}{hf_name(module)}.weight"] = hf_value(module, value, config)
        if (bias := f"{hf_name(module)}.bias") in constants:
            tensors[f"{PEFT}{bias}"] = constants[bias]

    with torch.device("meta"):
        names = [hf_name(name) for name in Transformer(config).state_dict()] + list(constants)
    modules = sorted({name.rpartition(".")[0] for name in names})
    parameters = [f"model.layers.{i}.mlp.experts.{p}" for i in range(config.n_layers) for p in STACKS]
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_folder,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0 if routed else lora.dropout,
        "target_modules": _endings([hf_name(module) for module in linear], modules),
        "modules_to_save": _endings([hf_name(module) for module in whole], modules) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if "output" in whole:
        values["ensure_weight_tying"] = True
    if routed:
        values["target_parameters"] = _endings(stacks, parameters)
        if any(name.endswith(STACKS[0]) for name in stacks):
            values["rank_pattern"] = {f"mlp.experts.{STACKS[0]}": 2 * lora.rank}
            values["alpha_pattern"] = {f"mlp.experts.{STACKS[0]}": 2 * lora.alpha}
    return values, tensors


def _stack_experts(layer: int, adapter: dict[str, Tensor], config: LMConfig, tensors: dict[str, Tensor]) -> list[str]:
    """Adds a layer's routed experts to peft's tensors; returns the full names of the parameters that they adapt.

    For W1 over W3 to get B1 A1 over B3 A3, its A is A1 over A3 and its B holds B1 and B3 on the diagonal: rank 2r.
    Shapes: A of all experts (E * r, in), expert by expert; B (out, r * E), the experts of a column side by side.
    """
    experts = f"layers.{layer}.feed_forward.experts"
    there = {
        part: [f"{experts}.{j}.{part}.{LORA[0]}" in adapter for j in range(config.n_routed_experts)]
        for part in ("w1", "w2", "w3")
    }
    if any(any(have) and not all(have) for have in there.values()) or there["w1"] != there["w3"]:
        found = ", ".join(f"{experts}.{j}.{part}" for part, have in there.items() for j, yes in enumerate(have) if yes)
        raise ValueError(
            f"peft adapts w1 and w3 of all experts of a layer together, and w2 of all, as transformers stacks them; "
            f"of {experts} this adapter has only {found}; merge it instead"
        )

    def stacked(part: str) -> tuple[Tensor, Tensor]:  # (E, r, in), (E, out, r)
        names = [f"{experts}.{j}.{part}" for j in range(config.n_routed_experts)]
        a, b = (torch.stack([adapter[f"{name}.{lora}"] for name in names]) for lora in LORA)
        return a, b

    found = {}
    if there["w1"][0]:
        (a1, b1), (a3, b3) = stacked("w1"), stacked("w3")
        found[STACKS[0]] = (
            torch.cat((a1, a3), 1),
            torch.stack([torch.block_diag(*pair) for pair in zip(b1, b3, strict=True)]),
        )
    if there["w2"][0]:
        found[STACKS[1]] = stacked("w2")
    for name, (a, b) in found.items():
        wrapper = f"{PEFT}{hf_name(experts)}"
        if name == STACKS[0] and STACKS[1] in found:  # peft wraps the module twice; the first of the two is inside
            wrapper += ".base_layer"
        tensors[f"{wrapper}.{LORA[0]}"] = a.flatten(0, 1)
        tensors[f"{wrapper}.{LORA[1]}"] = b.permute(1, 2, 0).flatten(1)
    return [f"{hf_name(experts)}.{name}" for name in found]


def _endings(chosen: list[str], names: list[str]) -> list[str]:
    """The shortest endings that the chosen names have and no other names: peft looks for endings."""
    endings = []
    for name in chosen:
        words = name.split(".")
        candidates = (".".join(words[i:]) for i in reversed(range(len(words))))
        ending = next(end for end in candidates if all(n in chosen for n in names if n.endswith(end)))
        if ending not in endings:
            endings.append(ending)
    return endings


def from_peft(
    values: dict, tensors: dict[str, Tensor], config: LMConfig, where: str
) -> tuple[dict[str, Tensor], LoRAConfig]:
    """Tensors and settings of our adapter from peft's, the reverse of to_peft.

    values: the content of adapter_config.json. where: what to call the adapter in messages.
    Raises: ValueError when the adapter does something that ours cannot, or does not fit the model.
    """
    _check_peft_settings(values, where)
    with torch.device("meta"):
        model = Transformer(config)
    constants = hf_constants(config)
    tensors = {name.removeprefix(PEFT): value.float() for name, value in tensors.items()}
    tensors = _unstack_experts(tensors, values, config, where)
    state = {}
    for name, value in tensors.items():
        ours = our_name(name)
        module = re.sub(r"(\.lora_[AB])?\.weight$", "", ours)
        if name in constants:
            if value.any():
                raise ValueError(f"{where} trains {name}, which this toolkit's model does not have")
        else:
            state[ours] = value if ours.endswith(LORA[0]) else hf_value(module, value, config, back=True)
    output = state.pop("output.weight", None)
    embeddings = state.get("tok_embeddings.weight")
    if (output is None) != (embeddings is None) or (output is not None and not torch.equal(output, embeddings)):
        raise ValueError(
            f"{where} trains embed_tokens and lm_head apart, which are one tensor here; train with "
            "modules_to_save embed_tokens and ensure_weight_tying"
        )

    weights = [name.removesuffix(".weight") for name, _ in model.named_parameters()]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in TIED]
    low_rank = {name.removesuffix(f".{LORA[0]}") for name in state if name.endswith(LORA[0])}
    whole = {name.removesuffix(".weight") for name in state if not name.endswith(LORA)}
    unknown = sorted((low_rank - set(linear)) | (whole - set(weights)))
    if unknown:
        raise ValueError(f"{where} trains what this model does not have or cannot adapt: {', '.join(unknown[:3])}")
    lora = LoRAConfig(
        rank=values["r"],
        alpha=values["lora_alpha"],
        dropout=values.get("lora_dropout") or 0.0,
        targets=_words(low_rank, linear, where),
        modules_to_save=_words(whole, weights, where),
    )
    add_adapter(model, lora)
    check_fit({name: value.shape for name, value in adapter_state(model).items()}, state, where)
    return state, lora


def _check_peft_settings(values: dict, where: str) -> None:
    """Raises ValueError when adapter_config.json asks for more than W + (alpha / r) B A with one alpha / r."""
    if values.get("peft_type") != "LORA" or not all(type(values.get(x)) in (int, float) for x in ("r", "lora_alpha")):
        raise ValueError(f"{where} is no LoRA adapter: adapter_config.json must have peft_type LORA, r and lora_alpha")
    plain = {"bias": "none", "use_rslora": False, "use_dora": False, "lora_bias": False, "layer_replication": None}
    for name, value in plain.items():
        if values.get(name, value) != value:
            raise ValueError(f"{where} has {name}={values[name]!r}, which this toolkit does not know")
    start = values.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(f"{where} has init_lora_weights={start!r}, which changes the base weights too")
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    scale = values["lora_alpha"] / values["r"]
    for name in ranks | alphas:
        if alphas.get(name, values["lora_alpha"]) / ranks.get(name, values["r"]) != scale:
            raise ValueError(
                f"{where} scales {name} otherwise than the rest; this toolkit has one alpha / rank for all"
            )


def _unstack_experts(tensors: dict[str, Tensor], values: dict, config: LMConfig, where: str) -> dict[str, Tensor]:
    """The tensors with the stacked ones taken apart, expert by expert; see _stack_experts."""
    result, layers = {}, {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(.*\.mlp\.experts)(\.base_layer)?\.(lora_[AB]\.weight)", name)
        if match:
            layers.setdefault(match[1], {})[bool(match[2]), match[3]] = value
        else:
            result[name] = value
    for experts, found in layers.items():
        parameters = values.get("target_parameters") or []
        adapted = [p for p in STACKS if any(f"{experts}.{p}".endswith(end) for end in parameters)]
        for i, stack in enumerate(adapted):
            is_inside = i < len(adapted) - 1
            a, b = (found.pop((is_inside, part), None) for part in LORA)
            if a is None or b is None or len(a) % config.n_routed_experts or a.shape[0] != b.shape[1]:
                raise ValueError(f"{where}: lora_A or lora_B of {experts}.{stack} is missing or of another size")
            a = a.unflatten(0, (config.n_routed_experts, -1))  # (E, r, in)
            b = b.unflatten(1, (-1, config.n_routed_experts)).permute(2, 0, 1)  # (E, out, r)
            parts = {"down_proj": (a, b)} if stack == STACKS[1] else _split_gate_up(a, b, values["r"], where)
            for part, (a_, b_) in parts.items():
                for j in range(config.n_routed_experts):
                    result[f"{experts}.{j}.{part}.{LORA[0]}"] = a_[j].contiguous()
                    result[f"{experts}.{j}.{part}.{LORA[1]}"] = b_[j].contiguous()
        if found:
            raise ValueError(f"{where}: target_parameters does not say what the tensors of {experts} adapt")
    return result


def _split_gate_up(a: Tensor, b: Tensor, rank: int, where: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of gate_proj and of up_proj from those of the two stacked; of one rank, they have A in common."""
    upper, lower = b.chunk(2, dim=1)
    if a.shape[1] == rank:
        return {"gate_proj": (a, upper), "up_proj": (a, lower)}
    if a.shape[1] != 2 * rank or upper[..., rank:].any() or lower[..., :rank].any():
        raise ValueError(
            f"{where}: gate_up_proj has rank {a.shape[1]} and mixes w1 with w3; only rank {rank} can be read here"
        )
    return {"gate_proj": (a[:, :rank], upper[..., :rank]), "up_proj": (a[:, rank:], lower[..., rank:])}


def _words(chosen: set[str], names: list[str], where: str) -> tuple[str, ...]:
    """Words between the dots that the chosen names have and no others: how LoRAConfig says what is meant."""
    missing, words = set(chosen), []
    parts = {name: name.split(".") for name in names}
    for depth in range(1, 1 + max(map(len, parts.values()))):
        for name in names:
            if name in missing and depth <= len(parts[name]):
                word = parts[name][-depth]
                fitting = {name for name in names if word in parts[name]}
                if fitting <= chosen:
                    words.append(word)
                    missing -= fitting
    if missing:
        raise ValueError(
            f"{where} adapts {sorted(missing)[0]} and not all like it, which --target and --modules_to_save cannot say"
        )
    return tuple(words)
