"""Floating-point operations of one training token, and what chips can do at most: the two halves of model FLOPs
utilisation (MFU).

Counted is what the mathematics needs, a multiplication and an addition as two operations (Chowdhery et al., arXiv
2204.02311, app. B): recomputed activations, softmax, norms and activation functions are not. Letters: D input, O
output dims, r rank, V vocabulary.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

# Apple's GPUs: cores of the largest variant and clock in GHz (hmc-tech.com and philipturner/metal-benchmarks, read
# 2026-11); a core has 128 lanes, each doing one fused multiply-add per cycle. Half precision is no faster up to
# M4.
APPLE_CORES_GHZ: dict[str, tuple[int, float]] = {
    "M1": (8, 1.278),
    "M1 Pro": (16, 1.296),
    "M1 Max": (32, 1.296),
    "M1 Ultra": (64, 1.296),
    "M2": (10, 1.398),
    "M2 Pro": (19, 1.398),
    "M2 Max": (38, 1.398),
    "M2 Ultra": (76, 1.398),
    "M3": (10, 1.398),
    "M3 Pro": (18, 1.398),
    "M3 Max": (40, 1.398),
    "M3 Ultra": (80, 1.398),
    "M4": (10, 1.578),
    "M4 Pro": (20, 1.578),
    "M4 Max": (40, 1.678),
}
# NVIDIA's, dense bfloat16 with float32 sums, from the product's data sheet or architecture white paper.
NVIDIA_TFLOPS: dict[str, float] = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A40": 150.0,
    "A10": 125.0,
    "RTX 6000 Ada": 364.0,
    "RTX A6000": 155.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
NO_LAYER = 2**31


@dataclass(frozen=True)
class TokenFlops:
    """Operations of one token.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass.
    """

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward


def peak_tflops(device_name: str | None = None) -> float | None:
    """What a device can do at most in 1e12 operations a second, or None when it is not in the tables.

    Args:
        device_name: as MLX gives it, such as "Apple M2 Ultra" or "NVIDIA H100 80GB HBM3". Default: this machine's
            GPU, if MLX uses it.
    """
    if device_name is None:
        if mx.default_device() != mx.gpu:
            return None
        device_name = str(mx.device_info().get("device_name", ""))
    if device_name.startswith("Apple "):
        cores, ghz = APPLE_CORES_GHZ.get(device_name.removeprefix("Apple "), (0, 0.0))
        return cores * 128 * 2 * ghz / 1e3 or None
    words = f" {device_name.replace('-', ' ')} "
    return next((tflops for name, tflops in NVIDIA_TFLOPS.items() if f" {name} " in words), None)


def token_flops(model: nn.Module, context: int) -> TokenFlops:
    """Operations of one token of ``model``, adapters and frozen weights as they are.

    Args:
        model: an mlx-lm model, before parallel wrappers divide it.
        context: length of the documents that tokens sit in; on average a token attends to half of it.

    A frozen matrix costs 2 D O forward and as much for the gradient of its input; a trained one another 2 D O for
    its own. LoRA adds 2 r (D + O) forward and twice that backward. Of E experts of which k are chosen, k count.
    Attention costs 4 H D (scores and weighted sum) times the keys a token sees, forward, and twice that backward;
    linear attention 7 Dk Dv per value head and token (decay, read, write and read of the state), and twice that
    backward; a causal convolution of K taps 2 K per channel. Embedding look-ups cost nothing, the output head 2 D
    V. Layers before the first trained one need no backward pass.
    """
    trained = tree_flatten(model.trainable_parameters())
    first_trained = min((_layer_index(name) for name, _ in trained), default=NO_LAYER)
    forward = backward = 0.0
    for path, module in model.named_modules():
        cost = _own_flops(path, module, model, context)
        forward += cost.forward
        backward += cost.backward if _layer_index(path) >= first_trained else 0.0
    return TokenFlops(forward, backward)


def _layer_index(path: str) -> int:
    """Number of the layer that ``path`` lies in; -1 for the input embedding, ``NO_LAYER`` for what comes after the
    layers.
    """
    if "embed_tokens" in path:
        return -1
    _, found, rest = path.partition("layers.")
    return int(rest.split(".")[0]) if found else NO_LAYER


def _own_flops(path: str, module: nn.Module, model: nn.Module, context: int) -> TokenFlops:
    """Operations that ``module`` itself does, its children not counted."""
    name = path.rsplit(".", 1)[-1]
    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
        return _matrix(module, 1.0) if name == "embed_tokens" and _head_is_tied(model) else TokenFlops(0, 0)
    if isinstance(module, nn.Conv1d):
        forward = 2.0 * module.weight.size
        return TokenFlops(forward, forward * (2 if "weight" not in module._no_grad else 1))
    if "lora_a" in module:
        share = _active_share(path, model)
        forward = 2.0 * share * (module.lora_a.size + module.lora_b.size)
        return TokenFlops(forward, 2 * forward)
    if isinstance(module.get("weight"), mx.array) and module.weight.ndim >= 2:
        return _matrix(module, _active_share(path, model))
    if "A_log" in module:
        heads, key_dim, value_dim = _state_shape(module)
        forward = 7.0 * heads * key_dim * value_dim
        return TokenFlops(forward, 2 * forward)
    if "o_proj" in module and "k_proj" in module:
        keys = min(context / 2, _window(path, model) or context)
        forward = 4.0 * _input_dims(module.o_proj) * keys
        return TokenFlops(forward, 2 * forward)
    return TokenFlops(0, 0)


def _matrix(module: nn.Module, share: float) -> TokenFlops:
    size = module.weight.size * (32 // module.bits if "scales" in module else 1)
    forward = 2.0 * size * share
    trained = "weight" not in module._no_grad and "scales" not in module
    return TokenFlops(forward, forward * (2 if trained else 1))


def _head_is_tied(model: nn.Module) -> bool:
    return "lm_head" not in getattr(model, "language_model", model)


def _active_share(path: str, model: nn.Module) -> float:
    """Of a stack of experts the share that one token visits, else 1."""
    module = _at(model, path)
    stacked = module.lora_a if "lora_a" in module else module.weight
    experts = module.linear if "linear" in module else module
    # A stack of another kind, such as one matrix per head (multi-head latent attention), is used whole.
    if stacked.ndim != 3 or not hasattr(experts, "num_experts"):
        return 1.0
    num_experts = experts.num_experts
    for above in _above(path, model):
        names = [name for name in ("top_k", "num_experts_per_tok") if hasattr(above, name)]
        chosen = getattr(above, names[0]) if names else None
        if chosen is not None:
            return chosen / num_experts
    return 1.0


def _state_shape(module: nn.Module) -> tuple[int, int, int]:
    """(value heads, key dims, value dims) of a linear-attention layer."""
    if hasattr(module, "num_v_heads"):
        return module.num_v_heads, module.head_k_dim, module.head_v_dim
    return module.num_heads, module.head_dim, module.head_dim


def _window(path: str, model: nn.Module) -> int | None:
    """Sliding window of an attention layer, or None."""
    for module in (_at(model, path), *_above(path, model)):
        if getattr(module, "is_sliding", False) or getattr(module, "use_sliding", False):
            return getattr(getattr(model, "language_model", model).args, "sliding_window", None)
    return None


def _input_dims(linear: nn.Module) -> int:
    linear = linear.get("linear", linear)
    return linear.weight.shape[-1] * (32 // linear.bits if "scales" in linear else 1)


def _at(model: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        model = model[int(part)] if isinstance(model, list) else model[part]
    return model


def _above(path: str, model: nn.Module) -> list[nn.Module]:
    """The modules that hold the one at ``path``, innermost first."""
    parts = path.split(".")
    found = [_at(model, ".".join(parts[:n])) for n in range(len(parts) - 1, -1, -1)]
    return [module for module in found if isinstance(module, nn.Module)]
