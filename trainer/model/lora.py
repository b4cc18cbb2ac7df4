"""LoRA and DoRA layers whose dropout does not depend on the mesh, and where to put them in a model.

The layers are mlx-lm's own, with mlx-lm's parameter names, so its tools open and fuse what is trained here.
What differs: dropout masks are drawn from keys of (seed, step, row), so that ranks, micro-batches, recompute
and resume see the same masks. LoRA: Hu et al., arXiv 2106.09685. DoRA: Liu et al., arXiv 2402.09353.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner import dora, lora

from trainer.nearest import nearest

LINEARS = (nn.Linear, nn.QuantizedLinear)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
ROUTER_NAMES = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class LoRASpec:
    """Which modules get adapters, and their shape.

    Attributes:
        paths: Module paths in the model, in model order.
        rank: Inner dimension of the update.
        scale: Factor on the update, alpha / rank.
        dropout: Probability of dropping an input of `lora_a` in training.
        method: "lora" | "dora".
    """

    paths: tuple[str, ...]
    rank: int
    scale: float
    dropout: float
    method: str


class DropoutKeys:
    """The dropout keys of the batch in flight, `(B, 2)` uint32, shared by all dropout layers of a model."""

    def __init__(self):
        self.current: mx.array | None = None


class RowDropout(nn.Module):
    """Dropout whose mask for row b of the batch is drawn from that row's key and this layer's name.

    Args:
        p: Probability of dropping.
        keys: Holder of the batch's keys; set before each forward pass.
        name: The layer's path; different layers draw different masks.
    """

    def __init__(self, p: float, keys: DropoutKeys, name: str):
        super().__init__()
        self.p = p
        self.batch_keys = keys
        self.salt = zlib.crc32(name.encode())

    def _extra_repr(self) -> str:
        return f"p={self.p}"

    def mask(self, shape: tuple[int, ...]) -> mx.array:
        """Boolean keep-mask for an input of `shape` `(B, ...)`."""
        keys = self.batch_keys.current
        assert keys is not None and keys.shape[0] == shape[0], f"dropout keys are not set for a batch of {shape[0]}"
        salted = keys ^ mx.array([self.salt, self.salt ^ 0x9E3779B9], dtype=mx.uint32)
        return mx.vmap(lambda key: mx.random.bernoulli(1.0 - self.p, shape[1:], key=key))(salted)

    def __call__(self, x: mx.array) -> mx.array:
        """Drop elements of `x` `(B, ...)` and scale the rest; the identity outside training or at p = 0."""
        if self.p == 0.0 or not self.training:
            return x
        return mx.where(self.mask(x.shape), x * (1.0 / (1.0 - self.p)), 0.0).astype(x.dtype)


def attach(model: nn.Module, spec: LoRASpec, keys: DropoutKeys, seed: int) -> None:
    """Replace the modules named in `spec` by LoRA or DoRA layers around them.

    Args:
        model: An mlx-lm model; its base parameters should be frozen already.
        spec: Modules, rank, scale, dropout.
        keys: Where the dropout layers find the keys of the batch in flight.
        seed: Initial values depend on it and on the module's path only, so any part of a model gets the same.
    """
    modules = dict(model.named_modules())
    layers = []
    for path in spec.paths:
        base = modules[path]
        layer = _layer_class(base, spec.method).from_base(base, r=spec.rank, scale=spec.scale, dropout=0.0)
        if not isinstance(base, EXPERTS):
            layer.dropout = RowDropout(spec.dropout, keys, path)
        _initialize(layer, base, mx.random.key(seed ^ zlib.crc32(path.encode())))
        layers.append((path, layer))
    model.update_modules(tree_unflatten(layers))


def find_targets(model: nn.Module, targets: str | list[str], num_layers: str | int, method: str) -> tuple[str, ...]:
    """Paths of the modules that `lora.targets` means.

    Args:
        model: An mlx-lm model without adapters.
        targets: "all-linear" (every linear inside the layers, experts included, routers not) or names: a
            module's last name ("q_proj") or any longer ending of its path ("self_attn.q_proj", "lm_head").
        num_layers: "all", or how many of the last layers get adapters.
        method: "lora" | "dora"; DoRA leaves experts out of "all-linear" (mlx-lm cannot load it there).

    Raises:
        ValueError: A name that matches nothing, or nothing that can be adapted.
    """
    total = len(model.layers)
    first = 0 if num_layers == "all" else max(0, total - int(num_layers))
    candidates = [(path, module) for path, module in model.named_modules() if _adaptable(module)]
    inside = [(p, m) for p, m in candidates if (layer := _layer_index(p)) is None or layer >= first]
    if targets == "all-linear":
        kinds = LINEARS if method == "dora" else LINEARS + EXPERTS
        chosen = [p for p, m in inside if _layer_index(p) is not None and isinstance(m, kinds) and not _is_router(p)]
    else:
        names = [targets] if isinstance(targets, str) else list(targets)
        _check_names(names, [p for p, _ in candidates])
        chosen = [p for p, m in inside if any(_ends_with(p, n) for n in names)]
        experts = [p for p, m in inside if p in set(chosen) and isinstance(m, EXPERTS)]
        if method == "dora" and experts:
            raise ValueError(f"lora.targets: DoRA is not defined for expert layers ({experts[0]}); use method: lora.")
    if not chosen:
        raise ValueError(f"lora.targets={targets!r} with lora.num_layers={num_layers!r} selects no module.")
    return tuple(chosen)


def limits_on_experts(model: nn.Module, spec: LoRASpec) -> list[str]:
    """What does not hold inside expert layers, one line each; `model` has the adapters of `spec`."""
    experts = [path for path, module in model.named_modules() if isinstance(module, EXPERTS)]
    lines = []
    if experts and spec.method == "dora":
        lines.append(f"method: dora leaves the {len(experts)} expert layers as they are; method: lora adapts them too")
    adapted = [path for path, module in model.named_modules() if isinstance(module, lora.LoRASwitchLinear)]
    if adapted and spec.dropout > 0:
        lines.append(f"lora.dropout={spec.dropout} is not applied inside the {len(adapted)} adapted expert layers")
    return lines


def is_adapter(name: str) -> bool:
    """Whether a parameter name belongs to an adapter (`lora_a`, `lora_b`, DoRA's `m`)."""
    return name.rsplit(".", 1)[-1] in ("lora_a", "lora_b", "m")


def _initialize(layer: nn.Module, base: nn.Module, key: mx.array) -> None:
    """`lora_a` uniform in +-1/sqrt(inputs) and `lora_b` zero (as mlx-lm and PEFT do), in the base's dtype."""
    inputs = layer.lora_a.shape[-1] if isinstance(base, EXPERTS) else layer.lora_a.shape[0]
    bound = inputs**-0.5
    dtype = base.scales.dtype if "scales" in base else base.weight.dtype
    dtype = dtype if mx.issubdtype(dtype, mx.floating) else mx.float32
    layer.lora_a = mx.random.uniform(-bound, bound, layer.lora_a.shape, key=key).astype(dtype)
    layer.lora_b = mx.zeros(layer.lora_b.shape, dtype=dtype)


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, LINEARS + EXPERTS + EMBEDDINGS)


def _layer_class(base: nn.Module, method: str) -> Any:
    if isinstance(base, EXPERTS):
        return lora.LoRASwitchLinear
    if isinstance(base, EMBEDDINGS):
        return dora.DoRAEmbedding if method == "dora" else lora.LoRAEmbedding
    return dora.DoRALinear if method == "dora" else lora.LoRALinear


def _layer_index(path: str) -> int | None:
    head, found, rest = path.partition("layers.")
    return int(rest.split(".", 1)[0]) if found and rest[:1].isdigit() else None


def _is_router(path: str) -> bool:
    parts = path.split(".")
    return parts[-1] in ROUTER_NAMES or "router" in parts


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _check_names(names: list[str], paths: list[str]) -> None:
    known = sorted({".".join(p.split(".")[i:]) for p in paths for i in range(len(p.split(".")))} - {""})
    unknown = [n for n in names if n not in known]
    if unknown:
        last = sorted({p.rsplit(".", 1)[-1] for p in paths})
        near = nearest(unknown[0], last)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ValueError(f"lora.targets: {unknown} match no module; this model has {last}.{hint}")
