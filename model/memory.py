"""How much memory a training run takes, from the numbers of the model alone: every term is a tensor of model.py.

Letters as in model.py: D model dim, V vocabulary, F width inside SwiGLU, N positions of a micro-batch, E experts.
"""

import torch

from model.LMConfig import LMConfig
from model.model import Transformer

LAUNCHERS = ("none", "ddp", "fsdp", "zero1", "zero2", "zero3")
FLOAT32 = 4  # bytes of a weight, of its gradient, of a number of optimizer state

# Measured on Linux x86-64, glibc 2.36, torch 2.13+cpu, two threads, as resident memory: 230 MiB after the imports of a
# training script; 50 for OpenMP, code read from disk when first used, buffers of products; 40 for tokenizer and data.
CPU_PROCESS = 320 * 2**20
# Freed memory that no later tensor fits in, as a share of activations and logits. torch asks glibc for aligned memory,
# for which glibc wants 96 bytes more than a freed tensor of the same size has left. Empirical: what resident memory
# is above the sum of the other terms after five to ten steps; from 0.1 (moe, batch 4) to 0.65 (small, batch 16,
# bfloat16), and different from run to run, since it depends on the order and sizes of all that is freed.
CPU_HOLES = 0.4
CUDA_WORKSPACE = 32 * 2**20  # cuBLAS takes this from torch's pool on sm90, a quarter of it on older GPUs
ZERO_BUCKET = 50_000_000  # numbers in reduce_bucket_size of scripts/zero*.json, which is allocated as a whole


def parameter_count(config: LMConfig) -> tuple[int, int]:
    """All parameters, the tied one once, and those that a single token goes through; allocates nothing."""
    with torch.device("meta"):
        model = Transformer(config)
    return model.num_parameters(), model.num_parameters(active=True)


def estimate_memory(
    config: LMConfig,
    *,
    batch_size: int,
    max_seq_len: int,
    dtype: torch.dtype,
    device_type: str = "cpu",
    launcher: str = "none",
    world_size: int = 1,
    optimizer: str = "adamw",
    grad_checkpoint: bool = False,
    target_share: float = 1.0,
    trainable: int | None = None,
) -> dict[str, int]:
    """Bytes that one process holds at its peak: weights, gradients, optimizer, activations, logits, other.

    On cuda it is what torch.cuda.max_memory_allocated counts, without the CUDA context; else resident memory.
    Gradients count whole, though without accumulation and DDP they are not all there when the logits are.

    Args:
        batch_size: rows of a micro-batch.
        dtype: of the products (torch.autocast); weights and optimizer state are float32.
        launcher: one of LAUNCHERS; the zeroN are DeepSpeed with scripts/zeroN.json.
        target_share: share of the positions whose logits are computed: 1 in pretraining, the answers in fine-tuning.
        trainable: parameters of an adapter when only that is trained, on top of the model's.

    Raises: ValueError on an unknown launcher, or on a combination that a run would refuse.
    """
    if launcher not in LAUNCHERS:
        raise ValueError(f"unknown launcher {launcher!r}; choose one of {', '.join(LAUNCHERS)}")
    if launcher == "none" and world_size > 1:
        raise ValueError(f"world_size {world_size} needs a launcher: {', '.join(LAUNCHERS[1:])}")
    if launcher.startswith("zero") and optimizer == "muon":
        raise ValueError("ZeRO flattens the matrices that Muon needs whole; use --optimizer adamw, or --launcher fsdp")

    D, V, layers = config.dim, config.vocab_size, config.n_layers  # noqa: N806
    N = batch_size * max_seq_len  # noqa: N806
    product = dtype.itemsize
    total, _ = parameter_count(config)
    block = (total - V * D - D) // layers  # parameters of one block; the rest is embedding and last norm
    router = config.n_routed_experts * D if config.use_moe else 0
    block_matrices = block - 2 * D - router  # multiplied in `dtype`: all but the norms and the router
    trained = total if trainable is None else trainable
    stored = total + (trainable or 0)
    share = {
        "weights": world_size if launcher in ("fsdp", "zero3") else 1,
        "gradients": world_size if launcher in ("fsdp", "zero2", "zero3") else 1,
        "optimizer": world_size if launcher in ("fsdp", "zero1", "zero2", "zero3") else 1,
    }

    weights = stored * FLOAT32 // share["weights"]
    if product < FLOAT32:  # what autocast makes of the matrices; the backward pass needs it again
        weights += V * D * product  # the output's
        weights += block_matrices * product * (1 if grad_checkpoint else layers)
    if launcher == "fsdp":
        weights += block * FLOAT32  # the block that computes, put together
        weights += (V * D + D) * FLOAT32  # embedding and last norm, put together from the first layer to the last
    if launcher == "zero3":  # put together and, below DeepSpeed's stage3_max_reuse_distance of 1e9, kept until the end
        weights += stored * FLOAT32

    gradients = trained * FLOAT32 // share["gradients"]
    if launcher == "fsdp":  # before they are summed over the ranks and cut: those of one block, of the embedding
        gradients += min(trained, block + V * D + D) * FLOAT32
    if launcher.startswith("zero"):  # the bucket in which they are summed; a CPU only holds the part that is written
        gradients += (min(trained, ZERO_BUCKET) if device_type == "cpu" else ZERO_BUCKET) * FLOAT32

    per_trained = 2 * FLOAT32  # AdamW: means of the gradient and of its square
    state = trained * per_trained
    if optimizer == "muon":  # one momentum for the matrices
        state -= (layers * block_matrices if trainable is None else trainable) * FLOAT32
    if launcher.startswith("zero"):  # the weights of this rank's share once more
        state += trained * FLOAT32
    state //= share["optimizer"]

    saved, in_flight = block_activations(config, max_seq_len, dtype, device_type, frozen=trainable is not None)
    kept = D * FLOAT32 if grad_checkpoint else saved  # grad_checkpoint: the input of every block
    last = D * FLOAT32 * (1 if trainable else 2) + (0 if trainable else D * product)  # the last norm and its result
    activations = N * (layers * kept + last)
    working = N * (in_flight + (saved if grad_checkpoint else 0))  # while one block's backward pass is computed

    targets = round(N * target_share)
    logit = product  # bytes of the model's result, each
    logit += FLOAT32  # its log-softmax, kept for the backward pass
    logit += FLOAT32  # the gradient of the log-softmax: -1 at the target, 0 elsewhere
    logit += FLOAT32  # the gradient of its input
    if device_type != "cuda":
        logit += product  # those of the step before, which the loop's variable holds until replaced
        logit += FLOAT32 if product < FLOAT32 else 0  # the float32 copy: freed, but the gradients find no place there
    logits = targets * V * logit

    if device_type == "cuda":
        # the logits are gone when the first block's backward pass is computed: what takes more counts
        activations += max(0, working - (logits - targets * V * product))
        other = CUDA_WORKSPACE
    else:
        # freed memory hardly ever fits the next tensor (CPU_HOLES), so what was there once stays beside the rest
        activations += working
        other = CPU_PROCESS + round(CPU_HOLES * (activations + logits))
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": state,
        "activations": activations,
        "logits": logits,
        "other": other,
    }


def block_activations(
    config: LMConfig, max_seq_len: int, dtype: torch.dtype, device_type: str = "cpu", frozen: bool = False
) -> tuple[int, int]:
    """Bytes a position for which one block keeps tensors until its backward pass, and for that pass's own gradients.

    `frozen`: only adapters are trained. Every product keeps its input in `dtype`; casting is done for every product
    anew, so that without autocast products of the same input share one tensor.
    """
    D, F = config.dim, config.ffn_dim  # noqa: N806
    product = dtype.itemsize
    cast = product < FLOAT32
    kv = config.n_kv_heads * config.head_dim
    same_input = 1 if not cast else 3  # wq, wk, wv
    same_hidden = 1 if not cast else 2  # w1, w3
    swiglu = 4 * F  # w1 x, its silu, w3 x, and their product, the input of w2

    residual = 2 * D + 2  # float32: the inputs of the two norms, and one over their root-mean-square
    normed = 0 if frozen else 2 * D  # float32: the two before they are multiplied with the norm's weight
    attention = same_input * D
    if device_type == "cpu":  # BlockAttention: queries, keys, values, result; then the input of wo
        attention += D + 2 * kv + D + D
    else:  # scaled_dot_product_attention: keys and values repeated for all heads; its result is the input of wo
        attention += 4 * D
        attention += max_seq_len  # the mask of the documents as numbers
        residual += config.n_heads  # float32: log-sum-exp of the scores
    if config.dropout:
        attention += 2 * D  # what is dropped, after attention and after feed-forward
    in_flight = 4 * D * FLOAT32 + 3 * F * product  # residual stream, what norms and SwiGLU pass back
    if not config.use_moe:
        return FLOAT32 * (residual + normed) + product * (attention + same_hidden * D + swiglu), in_flight

    k, E, shared = config.num_experts_per_tok, config.n_routed_experts, config.n_shared_experts  # noqa: N806
    experts = k * (same_hidden * D if cast else D)  # a copy of its input for every expert that a token goes to
    experts += k * swiglu
    if shared:
        experts += (same_hidden * D if cast else 0) + shared * swiglu  # without autocast its input is the router's
    routing = 0 if frozen else D  # float32: the router's input
    routing += 2 * k * D  # float32: what the experts return, and that times the router's weight
    routing += E + 3 * k  # probabilities, chosen weights before and after they are normed, and in the experts' order
    routing += 3 * k * 2  # 64-bit indices: the chosen experts, their order, the positions in that order
    in_flight += k * 2 * D * FLOAT32 + (k + shared) * 3 * F * product
    return FLOAT32 * (residual + normed + routing) + product * (attention + experts), in_flight


def memory_line(parts: dict[str, int]) -> str:
    """One line that says what estimate_memory found, in GiB."""
    each = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    return f"memory about {sum(parts.values()) / 2**30:.2f} GiB a process: {each}"
