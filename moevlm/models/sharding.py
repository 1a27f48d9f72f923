"""FSDP2: which modules form a sharding group.

One group per decoder layer and per vision block; the root group holds the rest: embeddings, connector, final norm and
head. The head must stay there, because losses and generation use it after the model's forward, when only the root's
parameters are still whole (design: `VLM.head`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from moevlm.models.moe.experts import StackedExperts
from moevlm.models.moe.lora_experts import LoRAExperts
from moevlm.models.moe.router import Router
from moevlm.models.pretrained import DTYPES
from moevlm.models.vlm import VLM


def shard(vlm: VLM, device_mesh: DeviceMesh | None, *, param_dtype: str | None = None, offload: bool = False) -> VLM:
    """Shard a VLM in place over a one-dimensional mesh; without a mesh it is returned unchanged.

    Call it on every rank with equal weights, after freezing; on teachers too. Every parameter becomes a DTensor.
    Gradients are averaged over the mesh, in float32.

    Args:
        device_mesh: the data-parallel dimension, for example ``mesh["data_parallel"]``.
        param_dtype: computation dtype of all but the routers, for example bfloat16; None keeps the parameters' own.
        offload: keep each rank's shard in the host's memory; a block is copied to the device while it runs.

    Raises:
        ValueError: a mesh of more than one dimension, or an unknown dtype.
    """
    if device_mesh is None:
        return vlm
    if vlm.lora is not None and vlm.lora.quantization is not None:
        raise ValueError(
            "weights in 4 bits cannot be sharded; set trainer to ddp or one device, or model.lora.quantization=null"
        )
    if device_mesh.ndim != 1:
        raise ValueError(f"shard takes the data-parallel dimension of a mesh, got {device_mesh.ndim} dimensions")
    if param_dtype is not None and param_dtype not in DTYPES:
        raise ValueError(f"unknown param_dtype {param_dtype!r}; known: {', '.join(DTYPES)}; set trainer.precision")
    dtype = None if param_dtype is None else DTYPES[param_dtype]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": device_mesh, "shard_placement_fn": _placements(vlm, device_mesh.size())}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device_mesh.device_type != "cpu")
    for router in [module for module in vlm.modules() if isinstance(module, Router)]:
        # a group of its own keeps a router in float32, and makes its weights whole whenever the gradient of its routing
        # record arrives, which does not pass through the layer's output
        router_policy = MixedPrecisionPolicy(
            param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        own = {key: value for key, value in options.items() if key != "shard_placement_fn"}
        fully_shard(router, mp_policy=router_policy, **own)
    for block in blocks_of(vlm):
        fully_shard(block, mp_policy=policy, **options)
    fully_shard(vlm, mp_policy=policy, **options)
    for method in ("embed", "decode"):  # entries other than forward
        register_fsdp_forward_method(vlm, method)
    return vlm


def shard_module(module: nn.Module, device_mesh: DeviceMesh | None, *, param_dtype: str | None = None) -> nn.Module:
    """Shard a module that is no VLM, as one group; without a mesh it is returned unchanged. Arguments as in `shard`."""
    if device_mesh is not None:
        dtype = None if param_dtype is None else DTYPES[param_dtype]
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        fully_shard(module, mesh=device_mesh, mp_policy=policy)
    return module


def blocks_of(vlm: VLM) -> list[nn.Module]:
    """Vision blocks and decoder layers: what is sharded, and moved between host and device, one by one."""
    vision_blocks = list(vlm.vision_encoder.vit.blocks) if vlm.vision_encoder is not None else []
    return [*vision_blocks, *vlm.decoder_blocks]


def _placements(vlm: VLM, world_size: int) -> Any:
    """Shard stacked experts along their width where their number does not divide by the ranks: padding costs memory."""
    stacked: set[nn.Parameter] = set()
    for module in vlm.modules():
        if isinstance(module, StackedExperts | LoRAExperts):
            stacked |= set(module.parameters())

    def placement(parameter: nn.Parameter) -> Shard | None:
        if parameter in stacked and parameter.shape[0] % world_size and parameter.shape[1] % world_size == 0:
            return Shard(1)
        return None

    return placement
