"""The architecture numbers of a model, each with its unit and legal range, and the named sizes."""

from dataclasses import asdict, dataclass, fields


@dataclass
class LMConfig:
    """MiniMind v1's configuration: same field names, same defaults.

    Raises: ValueError from the constructor when numbers contradict each other; the message names the field.
    """

    dim: int = 512  # width of the residual stream, a multiple of n_heads
    n_layers: int = 8  # transformer blocks, >= 1
    n_heads: int = 16  # query heads; head_dim = dim / n_heads, even (RoPE rotates pairs)
    n_kv_heads: int | None = 8  # key and value heads, divides n_heads; None: as many as n_heads
    vocab_size: int = 6400  # token ids the embedding knows
    hidden_dim: int | None = None  # width inside SwiGLU; None: v1's rule, see ffn_dim
    multiple_of: int = 64  # the rule rounds hidden_dim up to a multiple of this
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    max_seq_len: int = 512  # tokens the model was trained on; longer input is computed all the same
    rope_theta: float = 10000.0  # base of the rotary frequencies
    dropout: float = 0.0  # probability in [0, 1), during training only
    flash_attn: bool = True  # False: attention written out as softmax(QK^T)V, to read or to compare with
    use_moe: bool = False  # True: SwiGLU becomes a mixture of experts, and the fields below count
    num_experts_per_tok: int = 2  # routed experts each token visits, 1..n_routed_experts
    n_routed_experts: int = 4
    n_shared_experts: int = 1  # experts every token visits, >= 0 (v1's True is 1): one SwiGLU, this many times wide
    scoring_func: str = "softmax"  # how the router's logits become weights; softmax is the only one
    aux_loss_alpha: float = 0.01  # weight of the load-balancing loss
    seq_aux: bool = True  # balance within each sequence; False: within the whole micro-batch
    norm_topk_prob: bool = True  # weights of the chosen experts sum to 1

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        self.n_shared_experts = int(self.n_shared_experts or 0)
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least 1")
        if self.ffn_dim < 1:
            raise ValueError(f"hidden_dim is {self.hidden_dim}; it must be at least 1, or None for v1's rule")
        if self.n_shared_experts < 0:
            raise ValueError(f"n_shared_experts is {self.n_shared_experts}; it must be at least 0")
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head size dim/n_heads = {self.head_dim} is odd; rotary positions need an even one")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if self.use_moe:
            if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
                raise ValueError(
                    f"num_experts_per_tok {self.num_experts_per_tok} must be between 1 and "
                    f"n_routed_experts {self.n_routed_experts}"
                )
            if self.scoring_func != "softmax":
                raise ValueError(f"scoring_func {self.scoring_func!r} is unknown; use 'softmax'")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Width inside SwiGLU: two thirds of 4*dim, rounded up, so that three matrices cost what two would."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        return self.multiple_of * -(-int(2 * 4 * self.dim / 3) // self.multiple_of)

    @property
    def name_suffix(self) -> str:
        """What follows the stage in a file name: 512, or 512_moe."""
        return f"{self.dim}_moe" if self.use_moe else str(self.dim)

    def require(self, values: dict) -> None:
        """Raises ValueError unless the fields have these values: what was asked for cannot be had with this model."""
        for name, value in values.items():
            if getattr(self, name, None) != value:
                raise ValueError(
                    f"{name}={value} was asked for, but it is {getattr(self, name, 'unknown')}: it comes with the "
                    "weights, the tokenizer (vocab_size) or --max_seq_len"
                )

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "LMConfig":
        """Raises ValueError on a field this version does not know, which would change the model silently."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            known = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"unknown model setting {unknown[0]!r}; there are {known}")
        return cls(**values)

    @classmethod
    def from_size(cls, size: str, **overrides) -> "LMConfig":
        """The configuration of a named size, with single fields replaced. Raises ValueError on unknown names."""
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}; choose one of {', '.join(SIZES)}")
        return cls.from_dict(SIZES[size] | overrides)


SIZES = {
    "tiny": dict(dim=256, n_layers=6, n_heads=8, n_kv_heads=4),  # for a laptop without a GPU
    "small": dict(dim=512, n_layers=8),  # v1's 26M
    "base": dict(dim=768, n_layers=16),  # v1's 108M
    "moe": dict(dim=512, n_layers=8, use_moe=True),  # v1's 4x26M
}
