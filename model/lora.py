"""Low-rank adapters: a frozen weight W and a small trained addition, W + (alpha / r) B A.

Source: Hu et al. 2021, "LoRA", section 4.1. Modules are named as in peft: layers.0.attention.wq.lora_A.weight.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIED = ("tok_embeddings", "output")  # two names of one tensor


@dataclass
class LoRAConfig:
    """What an adapter changes. Raises: ValueError from the constructor, naming the field."""

    rank: int = 8  # r, rows of A and columns of B
    alpha: float = 16.0  # the addition is scaled by alpha / rank
    dropout: float = 0.0  # probability in [0, 1) on the input of A, during training only
    targets: tuple[str, ...] = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")  # parts of module names; "all"
    modules_to_save: tuple[str, ...] = ()  # parts of names whose weights are trained whole

    def __post_init__(self) -> None:
        self.targets, self.modules_to_save = tuple(self.targets), tuple(self.modules_to_save)
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}; it must be a whole number, at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if not self.targets:
            raise ValueError("an adapter needs at least one target, e.g. wq")
        if set(TIED) & set(self.targets):
            raise ValueError(
                "output shares its tensor with tok_embeddings, which a low-rank addition to one of them would part; "
                "train it whole with --modules_to_save tok_embeddings"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def to_dict(self) -> dict:
        return asdict(self) | {"targets": list(self.targets), "modules_to_save": list(self.modules_to_save)}


class LoRALinear(nn.Linear):
    """y = W x + (alpha / r) B A dropout(x), with W frozen. B is 0 at first, so that y is the old layer's.

    Shapes: weight W (out, in), lora_A.weight (r, in), lora_B.weight (out, r).
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig):
        nn.Module.__init__(self)  # the weight is there already
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, None
        place = {"bias": False, "device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Linear(linear.in_features, config.rank, **place)  # U(+-1 / sqrt(in))
        self.lora_B = nn.Linear(config.rank, linear.out_features, **place)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.lora_B(self.lora_A(self.dropout(x))) * self.scale


def add_adapter(model: nn.Module, config: LoRAConfig) -> None:
    """Puts an adapter into the model and freezes all other weights but those of modules_to_save.

    Raises: ValueError when a target or a module to save is none of the model's, naming those it has.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in TIED]
    weighted = [name.removesuffix(".weight") for name, _ in model.named_parameters(remove_duplicate=False)]
    chosen = _matching(linear, config.targets, "--target")
    saved = _matching(weighted, config.modules_to_save, "--modules_to_save")
    model.requires_grad_(False)
    for name in saved:
        modules[name].weight.requires_grad_(True)
    for name in chosen:
        if name in saved:
            raise ValueError(f"{name} is a target and a module to save; leave it out of one of the two")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(modules[name], config))


def _matching(names: list[str], wanted: tuple[str, ...], flag: str) -> list[str]:
    """The names that have one of the wanted words between their dots; every word must fit a name."""
    parts = {name: {*name.split("."), "all"} for name in names}
    for word in wanted:
        if not any(word in words for words in parts.values()):
            known = sorted({word for words in parts.values() for word in words if not word.isdigit()} - {"layers"})
            raise ValueError(f"{flag}: this model has no {word!r}; it has {', '.join(known)}")
    return [name for name in names if parts[name] & set(wanted)]


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by name, a tied one once: what an adapter's file holds."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_adapter_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copies an adapter's tensors into a model with the same adapter. Raises: ValueError naming what does not fit."""
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    check_fit({name: own[name].shape for name in own}, state, where)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def check_fit(wanted: dict[str, torch.Size], state: dict[str, Tensor], where: str) -> None:
    """Raises ValueError unless the tensors of an adapter are those wanted, naming the first few that differ."""
    if not state:
        raise ValueError(f"{where} is an empty adapter: it holds no tensors")
    wrong = [name for name in sorted(wanted.keys() | state.keys()) if _shape(wanted, name) != _shape(state, name)]
    if wrong:
        first = ", ".join(f"{name} is {_shape(state, name)}, wanted {_shape(wanted, name)}" for name in wrong[:3])
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{where} does not fit: {first}{more}")


def _shape(tensors: dict, name: str) -> tuple | str:
    if name not in tensors:
        return "missing"
    return tuple(getattr(tensors[name], "shape", tensors[name]))


def merged_tensor(name: str, weight: Tensor, adapter: dict[str, Tensor], scale: float, sign: int = 1) -> Tensor:
    """The weight of that name, e.g. layers.0.attention.wq.weight, with an adapter merged in; with sign -1, taken out.

    Computed in float32. Raises: ValueError when a weight that was trained whole is to be taken out: it is gone.
    """
    name = "tok_embeddings.weight" if name == "output.weight" else name
    module = name.removesuffix(".weight")
    if name in adapter:
        if sign < 0:
            raise ValueError(f"the adapter replaced {name} as a whole, so it cannot be taken out; use the base weights")
        return adapter[name].type_as(weight)
    if f"{module}.lora_A.weight" not in adapter:
        return weight
    a, b = adapter[f"{module}.lora_A.weight"], adapter[f"{module}.lora_B.weight"]
    return weight + (sign * scale) * (b.float() @ a.float()).type_as(weight)


def merge_state(state: dict[str, Tensor], adapter: dict[str, Tensor], scale: float, sign: int = 1) -> None:
    """Merges an adapter into a model's state dict in place, see merged_tensor; a tied tensor stays one."""
    for name in state:
        if name != "output.weight":
            state[name] = merged_tensor(name, state[name], adapter, scale, sign)
    state["output.weight"] = state["tok_embeddings.weight"]


def trainable_table(model: nn.Module) -> str:
    """A table of the trained weights: layers together, how many tensors, their shape, and their share of the model."""
    total = sum(parameter.numel() for parameter in model.parameters())
    rows: dict[tuple, list[int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = " x ".join(map(str, parameter.shape))
            key = ".".join("*" if part.isdigit() else part for part in name.split(".")), shape
            row = rows.setdefault(key, [0, 0])
            row[0] += 1
            row[1] += parameter.numel()
    lines = [f"{'trained weights':<48}{'shape':>14}{'tensors':>9}{'parameters':>13}"]
    lines += [f"{name:<48}{shape:>14}{count:>9}{size:>13,}" for (name, shape), (count, size) in rows.items()]
    count, size = (sum(row[i] for row in rows.values()) for i in (0, 1))
    lines.append(f"{f'together, {size / total:.2%} of {total:,}':<62}{count:>9}{size:>13,}")
    return "\n".join(lines)
