"""Optimizers as PyTorch users expect them, on top of `mlx.optimizers`, and learning-rate schedules.

MLX keeps Adam's moments in the parameter's dtype; here moments and the update are float32 whatever the model's
dtype, and `master_weights` keeps float32 copies of lower-precision parameters between steps. Weight decay is
decoupled where the optimizer has it so, and touches tensors of two or more dimensions only.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

Factory = Callable[[Any, float], optim.Optimizer]

# name -> (config, weight decay) -> optimizer. The learning rate is set before every update.
OPTIMIZERS: dict[str, Factory] = {
    "adamw": lambda c, decay: optim.AdamW(c.lr, c.betas, c.eps, weight_decay=decay, bias_correction=c.bias_correction),
    "adam": lambda c, decay: optim.Adam(c.lr, c.betas, c.eps, bias_correction=c.bias_correction),
    "sgd": lambda c, decay: optim.SGD(c.lr, weight_decay=decay),
    "lion": lambda c, decay: optim.Lion(c.lr, c.betas, weight_decay=decay),
    "adafactor": lambda c, decay: optim.Adafactor(
        c.lr, relative_step=False, scale_parameter=False, weight_decay=decay
    ),
    "muon": lambda c, decay: optim.Muon(c.lr, momentum=0.95, weight_decay=decay),
}


class Optimizer:
    """Float32 updates for the trainable parameters of a model.

    Args:
        params: `model.trainable_parameters()`.
        config: Has `name`, `lr`, `betas`, `eps`, `weight_decay`, `bias_correction`, `master_weights`.

    Muon (Jordan et al., 2024) updates the matrices inside the layers; embeddings, heads and vectors take AdamW.
    """

    def __init__(self, params: Any, config: Any):
        flat = dict(tree_flatten(params))
        self.parts = [(opt, names) for opt, names in _parts(flat, config) if names]
        self.master: dict[str, mx.array] = {}
        if config.master_weights:
            self.master = {n: p.astype(mx.float32) for n, p in flat.items() if p.dtype != mx.float32}
        for opt, names in self.parts:
            opt.init({n: mx.zeros(flat[n].shape, dtype=mx.float32) for n in names})

    def update(self, model: nn.Module, grads: Any, learning_rate: float) -> None:
        """Apply one update to `model`.

        Args:
            model: Holds the parameters that `grads` names.
            grads: Gradient tree of `model.trainable_parameters()`, any float dtype.
            learning_rate: The rate of this update.
        """
        flat_grads = dict(tree_flatten(grads))
        params = dict(tree_flatten(model.trainable_parameters()))
        updated = {}
        for opt, names in self.parts:
            opt.learning_rate = learning_rate
            wide = {n: self.master.get(n, params[n]).astype(mx.float32) for n in names}
            updated.update(opt.apply_gradients({n: flat_grads[n].astype(mx.float32) for n in names}, wide))
        self.master.update({n: updated[n] for n in self.master})
        model.update(tree_unflatten([(n, p.astype(params[n].dtype)) for n, p in updated.items()]))

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """Every array of the state as `(parameter name + "." + slot, array)`, e.g. `"….weight.m"`."""
        for opt, names in self.parts:
            for name in names:
                yield from ((f"{name}.{slot}", value) for slot, value in opt.state[name].items())
        yield from ((f"{name}.master", value) for name, value in self.master.items())

    def load(self, tensors: dict[str, mx.array], num_updates: int) -> None:
        """Restore what `tensors()` gave.

        Args:
            tensors: The arrays by the names of `tensors()`.
            num_updates: Updates applied so far (bias correction depends on it).

        Raises:
            ValueError: A tensor is missing.
        """
        missing = [name for name, _ in self.tensors() if name not in tensors]
        if missing:
            raise ValueError(f"The optimizer state lacks {len(missing)} tensors, the first is {missing[0]!r}.")
        for opt, names in self.parts:
            opt.state["step"] = mx.array(num_updates, mx.uint64)
            for name in names:
                for slot in opt.state[name]:
                    opt.state[name][slot] = tensors[f"{name}.{slot}"]
        self.master = {name: tensors[f"{name}.master"] for name in self.master}

    @property
    def num_updates(self) -> int:
        """Updates applied so far; skipped steps do not count."""
        return int(self.parts[0][0].step.item())

    @property
    def state(self) -> list:
        """Everything that `mx.eval` must reach after an update."""
        return [[opt.state for opt, _ in self.parts], self.master]


def _parts(flat: dict[str, mx.array], config: Any) -> list[tuple[optim.Optimizer, list[str]]]:
    make = OPTIMIZERS[config.name]
    matrices = [n for n, p in flat.items() if p.ndim >= 2]
    vectors = [n for n, p in flat.items() if p.ndim < 2]
    if config.name != "muon":
        return [(make(config, config.weight_decay), matrices), (make(config, 0.0), vectors)]
    hidden = [n for n in matrices if ".layers." in f".{n}"]
    rest = [n for n in matrices if n not in set(hidden)]
    adamw = OPTIMIZERS["adamw"]
    return [
        (make(config, config.weight_decay), hidden),
        (adamw(config, config.weight_decay), rest),
        (adamw(config, 0.0), vectors),
    ]


def learning_rate(step: int, total_steps: int, lr: float, schedule: Any) -> float:
    """The rate of update number `step` (from 0), as Hugging Face's schedules of the same names give it.

    Args:
        step: Updates done before this one.
        total_steps: Length of the run.
        lr: Peak rate.
        schedule: Has `name` ("constant" | "linear" | "cosine"), `warmup_steps`, `min_lr_ratio`.
    """
    if step < schedule.warmup_steps:
        return lr * step / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    progress = min(progress, 1.0)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[schedule.name]
    if schedule.name == "constant":
        return lr
    return lr * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * shape)
