"""Floating-point operations of one training token, and what chips can do at most: the two halves of model FLOPs
utilisation (MFU).

Counted is what the mathematics needs, a multiplication and an addition as two operations (Chowdhery et al., arXiv
2204.02311, app. B): recomputed activations, softmax, norms and activation functions are not. Letters: D input, O
output dims, r rank, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import comm

# Apple's GPUs: cores of the largest variant and clock in GHz. A core has 128 lanes, each doing one fused multiply-add
# per cycle (github.com/philipturner/metal-benchmarks, which also has the clocks of the M1 family); clocks of M2 and
# M3 from hmc-tech.com/gpu (3.58 TFLOPS for M2 and M3, 6.44 for M3 Pro, 14.32 for M3 Max), M1's and M2's also from
# forums.macrumors.com/threads/2471322 (2.6 and 3.55). An Ultra is two Max. Half precision is no faster. M4 (1.47 or
# 1.58 GHz, M4 Max 1.68 or 1.8) and M5 are absent: sources differ, or give no clock.
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
}
# NVIDIA's, dense bfloat16 with float32 sums. Figures printed "with sparsity" are halved. Each was read where the
# document named beside it is quoted. Others (GH200, RTX 6000 Ada, H200 NVL) could not be checked and are absent.
NVIDIA_TFLOPS: dict[str, float] = {
    "B200": 2250.0,  # Blackwell architecture brief, HGX B200 at 1000 W
    "H200": 989.5,  # the chip of H100 SXM with other memory (glennklockwood.com/garden/processors/h100)
    "H100 PCIe": 756.5,  # H100 data sheet: 1513 with sparsity
    "H100 NVL": 835.5,  # nvidia.com/en-us/data-center/h100: 1671 with sparsity
    "H100": 989.5,  # there, SXM: 1979 with sparsity
    "A100": 312.0,  # A100 data sheet: 312 | 624 with sparsity; SXM and PCIe alike
    "L40S": 362.0,  # L40S data sheet: 362.05 | 733
    "L4": 121.0,  # Ada architecture white paper 2.1, appendix D: 121 | 242
    "A40": 149.7,  # A40 data sheet: 149.7 | 299.4
    "A10": 125.0,  # A10 data sheet: 125 | 250
    "RTX A6000": 154.8,  # GA102 architecture white paper, table 3: 154.8/309.6
    "RTX 5090": 209.5,  # RTX Blackwell architecture white paper: 209.5/419
    "RTX 4090": 165.2,  # Ada architecture white paper, appendix A: 165.2/330.4
    "RTX 3090": 71.0,  # GA102 architecture white paper, appendix A
}
# Words that make another chip of a name in the table, unless the table has them.
VARIANTS = frozenset(("Ti", "D", "Laptop", "NVL"))
NO_LAYER = 2**31


@dataclass(frozen=True)
class TokenFlops:
    """Operations of one token.

    Attributes:
        forward: Operations of the forward pass.
        backward: Operations of the backward pass.
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
        device_name: The name that MLX gives, such as "Apple M2 Ultra" or "NVIDIA H100 80GB HBM3". Default: this machine's
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
    variants = VARIANTS & set(words.split())
    known = (name for name in NVIDIA_TFLOPS if f" {name} " in words and variants <= set(name.split()))
    return NVIDIA_TFLOPS.get(next(known, ""))


def token_flops(model: nn.Module, context: int) -> TokenFlops:
    """Operations of one token of `model`, adapters and frozen weights as they are.

    Args:
        model: An mlx-lm model, before parallel wrappers divide it.
        context: Length of the documents that tokens sit in; on average a token attends to half of it.

    A frozen matrix costs 2 D O forward and as much for the gradient of its input; a trained one another 2 D O for
    its own. LoRA adds 2 r (D + O) forward and twice that backward. Of E experts of which k are chosen, k count.
    Attention costs 4 H D (scores and weighted sum) times the keys a token sees, forward, and twice that backward;
    linear attention 7 Dk Dv per value head and token (decay, read, write and read of the state), and twice that
    backward; a causal convolution of K taps 2 K per channel. Embedding look-ups cost nothing, the output head 2 D
    V. Layers before the first trained one need no backward pass.
    """
    trained = comm.named_arrays(model.trainable_parameters())
    first_trained = min((_layer_index(name) for name, _ in trained), default=NO_LAYER)
    forward = backward = 0.0
    for path, module in model.named_modules():
        cost = _own_flops(path, module, model, context)
        forward += cost.forward
        backward += cost.backward if _layer_index(path) >= first_trained else 0.0
    return TokenFlops(forward, backward)


def _layer_index(path: str) -> int:
    """Number of the layer that `path` lies in; -1 for the input embedding, `NO_LAYER` for what comes after the
    layers.
    """
    if "embed_tokens" in path:
        return -1
    _, found, rest = path.partition("layers.")
    return int(rest.split(".")[0]) if found else NO_LAYER


def _own_flops(path: str, module: nn.Module, model: nn.Module, context: int) -> TokenFlops:
    """Operations that `module` itself does, its children not counted."""
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
            text: Any = getattr(model, "language_model", model)
            return getattr(text.args, "sliding_window", None)
    return None


def _input_dims(linear: nn.Module) -> int:
    linear = linear.get("linear", linear)
    return linear.weight.shape[-1] * (32 // linear.bits if "scales" in linear else 1)


def _at(model: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        model = model[int(part)] if isinstance(model, list) else model[part]
    return model


def _above(path: str, model: nn.Module) -> list[nn.Module]:
    """The modules that hold the one at `path`, innermost first."""
    parts = path.split(".")
    found = [_at(model, ".".join(parts[:n])) for n in range(len(parts) - 1, -1, -1)]
    return [module for module in found if isinstance(module, nn.Module)]
