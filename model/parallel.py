"""How one model is trained by several processes: plain, DDP, FSDP2, DeepSpeed's ZeRO.

Every class wraps a model and its optimizer, takes gradients and steps, and gives weights and optimizer state back
whole, in one format. So a run may be saved under one launcher and resumed under another, at any number of ranks.

    what a rank holds       weights    gradients    optimizer state
    Single, DDP             all        all          all
    FSDP                    a share    a share      a share
    ZeRO stage 1            all        all          a share
    ZeRO stage 2            all        a share      a share
    ZeRO stage 3            a share    a share      a share

Source: Li et al. 2020, "PyTorch Distributed"; Zhao et al. 2023, "PyTorch FSDP"; Rajbhandari et al. 2020, "ZeRO".
"""

import contextlib
import json
import logging
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.optim import Muon, orthogonalize

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


class Single:
    """One process. The others are told apart by what they do differently."""

    name = "none"

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        # fp16 has few exponent bits: small gradients vanish unless the loss is scaled up. No other format needs it.
        self.scaler = torch.amp.GradScaler(enabled=device.type == "cuda" and dtype == torch.float16)

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        self.model, self.optimizer = model, optimizer
        return model, optimizer

    def load_optimizer(self, optimizer: torch.optim.Optimizer, saved: dict) -> None:
        """Takes up what optimizer_state gave, before `wrap`."""
        optimizer.load_state_dict(saved)

    def sync_grads(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, clip: float) -> float:
        """Clips, updates the weights, clears the gradients; returns the gradient's norm before clipping.

        Weights stay as they were when the norm is not finite. With fp16 that is how the scaler finds its scale,
        and the norm is returned all the same.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip if clip > 0 else float("inf"))
        norm = whole(norm).item()
        if self.scaler.is_enabled() or norm - norm == 0:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self, model: nn.Module, names: set[str] | None = None) -> dict[str, Tensor]:
        """The model's weights (of those names) whole, float32, on the CPU; every rank must call. {} but on rank 0."""
        return gather({name: value for name, value in model.state_dict().items() if not names or name in names})

    def optimizer_state(self) -> dict:
        """The optimizer's state dict with whole tensors on the CPU; every rank must call. Empty but on rank 0."""
        state = self.optimizer.state_dict()
        return {
            "state": {index: gather(values) for index, values in state["state"].items()},
            "param_groups": state["param_groups"],
        }


class DDP(Single):
    """Every rank has the whole model and computes its rows; gradients are averaged over the ranks."""

    name = "ddp"

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        super().wrap(model, optimizer)
        devices = [self.device] if self.device.type == "cuda" else None
        self.model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        return self.model, optimizer

    def sync_grads(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.model.no_sync()


class Sharded(Single):
    """What FSDP and ZeRO share: the whole optimizer state of a resumed run would not fit on the device."""

    def load_optimizer(self, optimizer: torch.optim.Optimizer, saved: dict) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, values in saved["state"].items():
            optimizer.state[parameters[index]] = values  # on the CPU, until `wrap` takes this rank's share


class FSDP(Sharded):
    """Every rank keeps a slice of every tensor; a block's weights are put together while it computes.

    They travel in float32, and autocast makes bfloat16 of them as elsewhere: so norms and router stay float32.
    """

    name = "fsdp"

    def __init__(self, device: torch.device, dtype: torch.dtype, cpu_offload: bool):
        if dtype == torch.float16:
            raise ValueError("--fsdp needs --dtype bfloat16 or float32: float16's loss scaling is not sharded")
        super().__init__(device, dtype)
        self.cpu_offload = cpu_offload

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
        names = {parameter: name for name, parameter in model.named_parameters()}
        settings = {
            "mesh": dist.device_mesh.init_device_mesh(self.device.type, (dist.get_world_size(),)),
            "offload_policy": CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy(),
        }
        for block in model.layers:
            fully_shard(block, **settings)
        fully_shard(model, **settings)  # what is left: embedding and last norm

        shards = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [shards[names[parameter]] for parameter in group["params"]]
        for parameter in list(optimizer.state):  # of a run that is resumed
            shard = shards[names[parameter]]
            steps_device = shard.device if optimizer.defaults["fused"] else "cpu"
            optimizer.state[shard] = {
                key: value.to(steps_device) if key == "step" else slice_like(value, shard)
                for key, value in optimizer.state.pop(parameter).items()
            }
        if isinstance(optimizer, Muon):
            optimizer.direction = lambda momentum: slice_like(orthogonalize(whole(momentum)), momentum)
        return super().wrap(model, optimizer)

    def sync_grads(self, last: bool) -> contextlib.AbstractContextManager:
        self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()


class ZeRO(Sharded):
    """DeepSpeed's engine, stage 1, 2 or 3 as its configuration says; batch, accumulation and clipping are ours."""

    name = "deepspeed"

    def __init__(self, device: torch.device, dtype: torch.dtype, args):
        if dtype == torch.float16:
            raise ValueError("--deepspeed needs --dtype bfloat16 or float32")
        if args.optimizer == "muon":
            raise ValueError("ZeRO flattens the matrices that Muon needs whole; use --optimizer adamw, or --fsdp")
        super().__init__(device, dtype)
        try:
            import deepspeed
        except ImportError:
            raise ValueError("--deepspeed needs a package: pip install deepspeed") from None
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if device.type == "cpu":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile for minutes
        self.deepspeed, self.config = deepspeed, deepspeed_config(args, dtype)

    @property
    def stage(self) -> int:
        return self.config["zero_optimization"]["stage"]

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        saved = optimizer.state_dict()  # of a run that is resumed, else empty
        self.param_groups = saved["param_groups"]
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.state.clear()
        engine, optimizer, _, _ = self.deepspeed.initialize(model=model, optimizer=optimizer, config=self.config)
        super().wrap(engine, optimizer)
        self._make_state(saved["state"])
        return engine, optimizer

    def _make_state(self, saved: dict[int, dict[str, Tensor]]) -> None:
        """Makes this rank's share of AdamW's state: as saved, or as before the first step."""
        zero = self.optimizer
        steps = saved[0]["step"] if saved else torch.zeros(())
        for flat in zero.single_partition_of_fp32_groups if self.stage < 3 else zero.fp32_partitioned_groups_flat:
            zero.optimizer.state[flat] = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
            zero.optimizer.state[flat]["step"] = steps.to(flat.device, copy=True)
        if self.stage < 3:  # by itself it would look at the first group only, after the first step
            self.optimizer._lazy_init_hp_params_optimizer_state()
        for index, values in saved.items():
            parameter = self.parameters[index]
            for key in ("exp_avg", "exp_avg_sq"):
                value = values[key].to(self.device).flatten()
                if self.stage < 3:
                    self.deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)
                else:
                    size = parameter.ds_tensor.ds_numel  # of a rank's share, the last one padded
                    value = nn.functional.pad(value, (0, size * dist.get_world_size() - value.numel()))
                    share = value[size * dist.get_rank() :][:size]
                    self.deepspeed.utils.safe_set_local_optimizer_state(parameter, share, key)

    def sync_grads(self, last: bool) -> contextlib.AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, clip: float) -> float:
        self.model.step()
        return float(self.model.get_global_grad_norm())

    def weights(self, model: nn.Module, names: set[str] | None = None) -> dict[str, Tensor]:
        found = dict(model.named_parameters(remove_duplicate=False))
        found = {name: value for name, value in found.items() if not names or name in names}
        if self.stage < 3:
            return gather(found)
        weights = {}
        for name, parameter in found.items():
            with self.deepspeed.zero.GatheredParameters([parameter]):
                weights |= gather({name: parameter.detach().clone()})
        return weights

    def optimizer_state(self) -> dict:
        steps = next(iter(self.optimizer.optimizer.state.values()))["step"]  # the same for all
        full = self.deepspeed.utils.safe_get_full_optimizer_state
        return {
            "state": {
                index: gather({"step": steps} | {key: full(parameter, key) for key in ("exp_avg", "exp_avg_sq")})
                for index, parameter in enumerate(self.parameters)
            },
            "param_groups": self.param_groups,
        }


def deepspeed_config(args, dtype: torch.dtype) -> dict:
    """The configuration file that --deepspeed names, with the batch, clipping and number format of our flags.

    Raises: ValueError when the file is none, or asks for what our flags decide.
    """
    name = args.deepspeed or "zero2"
    path = SCRIPTS / f"{name}.json" if name in ("zero1", "zero2", "zero3") else Path(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--deepspeed {path}: there is no such file") from None
    except ValueError as error:
        raise ValueError(f"--deepspeed {path} is not JSON: {error}") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise ValueError(f'--deepspeed {path}: it must hold {{"zero_optimization": {{"stage": 1, 2 or 3}}}}')
    ours = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": args.accumulation_steps,
        "gradient_clipping": args.grad_clip,
        "torch_autocast": {
            "enabled": dtype != torch.float32,
            "dtype": str(dtype).removeprefix("torch."),
            "lower_precision_safe_modules": [],  # gradients are summed in float32
        },
    }
    flags = {"optimizer": "--optimizer", "scheduler": "--warmup_steps", "bf16": "--dtype", "fp16": "--dtype"}
    flags |= {"train_batch_size": "--batch_size", **dict.fromkeys(ours, "the flags of the script")}
    for key, flag in flags.items():
        if config.get(key, "auto") not in ("auto", ours.get(key)):
            raise ValueError(f"--deepspeed {path}: {key} is decided by {flag}; remove it from the file")
    theirs = {key: value for key, value in config.items() if key not in flags}
    # our AdamW is torch's, also where the file moves its state to the CPU
    return theirs | ours | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this rank may hold a slice; every rank must call."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def slice_like(value: Tensor, shard: Tensor) -> Tensor:
    """This rank's slice of a whole tensor, cut as FSDP's `shard` is, on its device."""
    from torch.distributed.tensor import distribute_tensor  # takes seconds to import

    mesh = shard.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, shard.placements).to(shard.device)


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whole, on the CPU; empty but on rank 0. One at a time, so that no rank holds all of them."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    gathered = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor)
        if main:
            # a copy: what shares memory in a file would share it after loading
            gathered[name] = tensor.detach().cpu().clone() if isinstance(tensor, Tensor) else tensor
    return gathered
