"""Checks that every rank runs in one launch, after the parity cases; each returns what the tests assert on."""

from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers

import comm
from parallel import DataParallel, TensorParallel, gather_tensors, model_layout, shard_linear
from parallel.architectures import ARCHITECTURES, BlockPlan, ModelPlan, rows
from tensor_cases import batch, first_gradients, relative_error, worst
from tensor_models import add_adapters, make_model, prepare, randomize_adapters
from trainer.data import build_tokenizer
from trainer.model.lora import DropoutKeys, LoRASpec, attach, find_targets


class Recorder:
    """Stands in for `mx.distributed` in a group and counts messages by operation and number of elements."""

    def __init__(self, engine: Any):
        self.engine = engine
        self.messages: Counter = Counter()

    def __getattr__(self, operation: str) -> Any:
        call = getattr(self.engine, operation)

        def counted(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            self.messages[operation, x.size] += 1
            return call(x, *args, **kwargs)

        return counted


def message_counts(group: comm.Group) -> dict[str, Any]:
    """Messages of one more layer in a training step: activation-sized sums, and the sizes of all others."""
    result = {}
    plain, group._engine = group._engine, Recorder(group._engine)
    for architecture in ("llama", "qwen3", "qwen3_moe", "qwen3_5"):
        for method in ("full", "lora"):
            counts = []
            for num_layers in (2, 4):
                model = prepare(make_model(architecture, num_hidden_layers=num_layers), method)
                TensorParallel(model, group)
                group._engine.messages.clear()
                first_gradients(model)
                counts.append(Counter(group._engine.messages))
            more = counts[1] - counts[0]
            tokens = batch(0)["tokens"]
            activation = tokens.shape[0] * (tokens.shape[1] - 1) * 64
            sums = {key: n for key, n in more.items() if key[1] == activation}
            rest = {f"{op} {size}": n / 2 for (op, size), n in more.items() if size != activation}
            result[f"{architecture}:{method}"] = {"activation": sum(sums.values()) / 2, "parameters": rest}
    group._engine = plain
    return result


def generation(group: comm.Group) -> dict[str, Any]:
    """Tokens of `stream_generate` on the whole and on the divided model."""
    tokenizer = TokenizerWrapper(build_tokenizer(["to be or not to be"] * 3, 260))
    result = {}
    for architecture in ("llama", "qwen3_5", "gemma3", "phi3"):
        vocab_size = 264
        whole = make_model(architecture, vocab_size=vocab_size).eval()
        divided = TensorParallel(make_model(architecture, vocab_size=vocab_size), group).eval()
        prompt = [3, 50, 7, 120, 9]
        tokens = [
            [r.token for r in stream_generate(m, tokenizer, prompt, max_tokens=12)] for m in (whole, divided)
        ]
        cache = divided.make_cache() if hasattr(divided, "make_cache") else []
        divided(mx.array([prompt]), cache=cache or None)
        heads = [c.keys.shape[1] for c in cache if getattr(c, "keys", None) is not None]
        result[architecture] = {"whole": tokens[0], "divided": tokens[1], "cached_heads": heads}
    return result


def adapters_after(group: comm.Group) -> dict[str, Any]:
    """LoRA put in by mlx-lm's own function, and DoRA by the layers, after TensorParallel."""
    config = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    result = {}
    for architecture in ("qwen3", "qwen3_moe"):
        models = [make_model(architecture), TensorParallel(make_model(architecture), group)]
        for model in models:
            model.freeze()
            mx.random.seed(5)
            linear_to_lora_layers(model, 2, config)
            model.lm_head = _lora_of(model.lm_head)
        initial = _largest_difference(models, group)
        for model in models:
            _randomize(model)
        result[architecture] = {"initial": initial, "gradient": _compare_gradients(*models)}
    models = [make_model("qwen3"), TensorParallel(make_model("qwen3"), group)]
    for model in models:
        model.freeze()
    add_adapters(models[0], dora=True)
    divided = [(p, m.to_dora(r=4, scale=2.0)) for p, m in models[1].named_modules() if ".layers." in p and hasattr(m, "to_dora")]
    models[1].update_modules(tree_unflatten(divided))
    initial = _largest_difference(models, group, "m")
    for model in models:
        _randomize(model)
    result["dora"] = {"initial": initial, "gradient": _compare_gradients(*models)}
    return result


def _lora_of(linear: nn.Module) -> nn.Module:
    return linear.to_lora(r=4, scale=2.0) if hasattr(linear, "to_lora") else LoRALinear.from_base(linear, r=4, scale=2.0)


def adapters_by_name(group: comm.Group) -> dict[str, Any]:
    """Adapters on routers, the head and the embedding, put in before; initial values, gradients."""
    result = {}
    for architecture in ("qwen3_moe", "llama"):
        models = [make_model(architecture) for _ in range(2)]
        for model in models:
            model.freeze()
            names = ["q_proj", "o_proj", "embed_tokens"] + (["mlp.gate", "lm_head"] if architecture == "qwen3_moe" else [])
            paths = find_targets(model, names, "all", "lora")
            attach(model, LoRASpec(paths, 4, 2.0, 0.0, "lora"), DropoutKeys(), seed=11)
        TensorParallel(models[1], group)
        initial = _largest_difference(models, group)
        for model in models:
            _randomize(model)
        result[architecture] = {"initial": initial, "gradient": _compare_gradients(*models)}
    return result


def checkpointed_layers(group: comm.Group) -> dict[str, Any]:
    """Gradients when each layer is computed again in the backward pass."""
    result = {}
    for method in ("full", "lora"):
        whole = prepare(make_model("qwen3"), method)
        divided = TensorParallel(prepare(make_model("qwen3"), method), group)
        layer_class = type(divided.layers[0])
        plain_call = layer_class.__call__
        losses_and_grads = first_gradients(whole)
        grad_checkpoint(divided.layers[0])
        result[method] = _compare_with(*losses_and_grads, divided)
        layer_class.__call__ = plain_call
    return result


def dropout(group: comm.Group) -> dict[str, Any]:
    """LoRA with dropout: the masks of the whole model, drawn from row keys and by mlx's own dropout."""
    models = [make_model("qwen3_5") for _ in range(2)]
    keys = DropoutKeys()
    keys.current = mx.random.randint(0, 2**31, (2, 2), key=mx.random.key(3)).astype(mx.uint32)
    for model in models:
        model.freeze()
        paths = find_targets(model, "all-linear", "all", "lora")
        attach(model, LoRASpec(paths, 4, 2.0, 0.3, "lora"), keys, seed=11)
        randomize_adapters(model, 1)
    TensorParallel(models[1], group)
    by_key = _compare_gradients(*models)
    linears = [nn.Linear(32, 16) for _ in range(2)]
    for linear in linears:
        linear.update({"weight": mx.random.normal((16, 32), key=mx.random.key(1)), "bias": mx.zeros(16)})
    layers = []
    for linear in linears:
        mx.random.seed(9)
        layer = LoRALinear.from_base(linear, r=4, dropout=0.5, scale=2.0)
        layer.lora_b = mx.random.normal((4, 16), key=mx.random.key(2))
        layers.append(layer)
    layers[1] = shard_linear(layers[1], "sharded-to-all", group=group)
    x = mx.random.normal((3, 32), key=mx.random.key(4))
    outputs = []
    for layer, part in zip(layers, (x, mx.split(x, group.size, axis=-1)[group.rank])):
        mx.random.seed(21)
        outputs.append(layer.train()(part))
    return {"by_key": by_key, "by_state": relative_error(outputs[1], outputs[0])}


def wrapper_behaviour(group: comm.Group) -> dict[str, Any]:
    """What DESIGN promises of wrappers: same object, flags, names, printing, nesting."""
    plain, module = make_model("qwen3"), make_model("qwen3")
    names = [name for name, _ in tree_flatten(module.parameters())]
    q_proj_class, attention_class = type(module.layers[0].self_attn.q_proj), type(module.layers[0].self_attn)
    module.layers[0].self_attn.freeze()
    wrapped = DataParallel(TensorParallel(module, group), comm.solo())
    frozen = "layers.0.self_attn" not in " ".join(n for n, _ in tree_flatten(wrapped.trainable_parameters()))
    wrapped.freeze()
    none = len(tree_flatten(wrapped.trainable_parameters()))
    wrapped.unfreeze()
    wrapped.eval()
    layer = wrapped.layers[0]
    lines = [repr(m).split("ranks=")[0].rstrip(", ") for m in (layer.self_attn.q_proj, layer.mlp.down_proj)]
    weights = [(name, array + 1.0) for name, array in tree_flatten(wrapped.parameters())]
    wrapped.load_weights(weights)
    moved = abs(wrapped.layers[1].mlp.up_proj.weight - dict(weights)["model.layers.1.mlp.up_proj.weight"]).max().item()
    return {
        "same_object": wrapped is module,
        "same_names": names == [name for name, _ in tree_flatten(wrapped.parameters())],
        "is_linear": isinstance(layer.self_attn.q_proj, q_proj_class) and isinstance(layer.self_attn, attention_class),
        "frozen_stays": frozen and none == 0,
        "modes": [wrapped.training, layer.self_attn.q_proj.training, layer.self_attn.training],
        "printed": lines,
        "printed_whole": [repr(plain.layers[0].self_attn.q_proj), repr(plain.layers[0].mlp.down_proj)],
        "printed_embedding": repr(wrapped.model.embed_tokens),
        "printed_convolution": repr(TensorParallel(make_model("qwen3_5"), group).layers[0].linear_attn.conv1d),
        "printed_convolution_whole": repr(make_model("qwen3_5").layers[0].linear_attn.conv1d),
        "moved": moved,
    }


def wrong_plan(group: comm.Group) -> dict[str, Any]:
    """A plan that forgets the sum after the MLP: the comparison must see it."""
    right = ARCHITECTURES["qwen3"].tensor
    mlp = next(block for block in right.blocks if block.marker == "gate_proj")
    cuts = {**mlp.cuts, "down_proj": rows(leaves=False)}
    wrong = ModelPlan((right.blocks[0], BlockPlan(name="mlp", marker="gate_proj", cuts=cuts)))
    whole, divided = make_model("qwen3"), TensorParallel(make_model("qwen3"), group, plan=wrong)
    return {"gradient": _compare_gradients(whole, divided)}


def round_trip(group: comm.Group) -> dict[str, Any]:
    """Gathered weights equal the whole model's bit by bit, and cut again they are the rank's slices."""
    result = {}
    for architecture in ("llama", "qwen3_moe", "qwen3_5", "phi3"):
        whole, divided = make_model(architecture), TensorParallel(make_model(architecture), group)
        layout = model_layout(divided)
        local = dict(tree_flatten(divided.parameters()))
        full = dict(gather_tensors(layout, local.items()))
        same = all(mx.array_equal(full[name], array).item() for name, array in tree_flatten(whole.parameters()))
        back = all(mx.array_equal(layout[name].slice(full[name]), local[name]).item() for name in layout)
        shapes = all(layout[name].full_shape(local[name].shape) == full[name].shape for name in layout)
        result[architecture] = {"gathered": same, "sliced": back, "shapes": shapes, "num_split": len(layout)}
    return result


def standalone_linears(group: comm.Group) -> dict[str, Any]:
    """A model of two linears divided by `shard_linear` alone, with biases, fused segments, LoRA and 4 bits."""

    class Pair(nn.Module):
        def __init__(self, divided: bool, adapters: bool, bits: int | None):
            super().__init__()
            self.up, self.down = nn.Linear(64, 256), nn.Linear(128, 64)
            if bits:
                self.up, self.down = self.up.to_quantized(32, bits), self.down.to_quantized(32, bits)
            if adapters:
                self.freeze()
                self.update_modules({"up": _lora_of(self.up), "down": _lora_of(self.down)})
                randomize_adapters(self, 4)
            if divided:
                self.up = shard_linear(self.up, "all-to-sharded", segments=2, group=group)
                self.down = shard_linear(self.down, "sharded-to-all", group=group)

        def __call__(self, x: mx.array) -> mx.array:
            gate, value = mx.split(self.up(x), 2, axis=-1)
            return self.down(nn.silu(gate) * value)

    result = {}
    x = mx.random.normal((5, 64), key=mx.random.key(8))
    for label, adapters, bits in (("plain", False, None), ("lora", True, None), ("qlora", True, 4)):
        found = []
        for divided in (False, True):
            mx.random.seed(6)
            pair = Pair(divided, adapters, bits)

            def total(pair: nn.Module, x: mx.array) -> mx.array:
                return pair(x).square().sum()

            value, grads = nn.value_and_grad(pair, total)(pair, x)
            flat = dict(gather_tensors(model_layout(pair), tree_flatten(grads)))
            found.append((value, flat))
        (value, grads), (divided_value, divided_grads) = found
        errors = {name: relative_error(divided_grads[name], grad) for name, grad in grads.items()}
        errors["value"] = relative_error(divided_value, value)
        result[label] = worst(errors)
    return result


def _compare_gradients(whole: nn.Module, divided: nn.Module) -> tuple[str, float]:
    return _compare_with(*first_gradients(whole), divided)


def _compare_with(loss: mx.array, grads: dict[str, mx.array], divided: nn.Module) -> tuple[str, float]:
    divided_loss, local = first_gradients(divided)
    full = dict(gather_tensors(model_layout(divided), local.items()))
    errors = {name: relative_error(full[name], grad) for name, grad in grads.items()}
    return worst({**errors, "loss": relative_error(divided_loss, loss)})


def _largest_difference(models: list[nn.Module], group: comm.Group, ending: str = "") -> float:
    whole = dict(tree_flatten(models[0].trainable_parameters()))
    full = dict(gather_tensors(model_layout(models[1]), tree_flatten(models[1].trainable_parameters())))
    assert list(whole) == list(full), f"names differ: {set(whole) ^ set(full)}"
    return max(abs(full[name] - array).max().item() for name, array in whole.items() if name.endswith(ending))


def _randomize(model: nn.Module) -> None:
    """Both factors random, whole on one device and sliced on the ranks."""
    layout = model_layout(model)
    changed = []
    for i, (name, array) in enumerate(tree_flatten(model.trainable_parameters())):
        if name.endswith(("lora_a", "lora_b")):
            shape = layout[name].full_shape(array.shape) if name in layout else array.shape
            full = 0.1 * mx.random.normal(shape, key=mx.random.key(i))
            changed.append((name, layout[name].slice(full) if name in layout else full))
    model.update(tree_unflatten(changed))
