"""Checks that every rank runs in one launch; each returns what the tests assert on."""

import time
import warnings
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.generate import stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

import comm
from fake import fake_group
from mesh_cases import micro_batches, rows_of
from parallel import (
    FullyShardedDataParallel,
    PipelineParallel,
    bubble_pct,
    evaluate,
    gather_tensors,
    hidden_and_head,
    model_layout,
    slice_tensors,
    value_and_grad,
)
from parallel.pipeline.step import PipelineStep
from tensor_cases import loss_fn, relative_error
from tensor_models import make_model
from trainer.data import build_tokenizer
from trainer.layers.checkpointing import checkpoint_layers
from trainer.model.method import prepare_for_training

FORWARD_SECONDS, BACKWARD_SECONDS = 0.04, 0.08


def generation(group: comm.Group) -> dict[str, Any]:
    """Tokens of `stream_generate` on the whole and on the cut model, past the window of the sliding layers."""
    tokenizer = TokenizerWrapper(build_tokenizer(["to be or not to be"] * 3, 260))
    result = {}
    for architecture in ("llama", "qwen3_5", "gemma3"):
        whole = make_model(architecture, vocab_size=264, num_hidden_layers=4).eval()
        cut = PipelineParallel(make_model(architecture, vocab_size=264, num_hidden_layers=4), group).eval()
        prompt = [3, 50, 7, 120, 9, 11] * 4
        tokens = [
            [r.token for r in stream_generate(m, tokenizer, prompt, max_tokens=8, prefill_step_size=16)] for m in (whole, cut)
        ]
        result[architecture] = {"whole": tokens[0], "cut": tokens[1]}
    return result


def evaluation(group: comm.Group) -> dict[str, float]:
    """Mean loss of three batches on the whole and on the cut model."""
    batches = [rows_of(i) for i in range(3)]
    whole, _ = evaluate(make_model("gemma3", num_hidden_layers=4), loss_fn)(batches)
    cut, num_tokens = evaluate(PipelineParallel(make_model("gemma3", num_hidden_layers=4), group), loss_fn)(batches)
    return {"whole": whole, "cut": cut, "tokens": num_tokens}


def gradients_of(model: nn.Module, loss: Any, batches: list[dict[str, mx.array]]) -> dict[str, mx.array]:
    """Gradients by name."""
    loss, grads, num_tokens = value_and_grad(model, loss)(batches)
    # The same outputs on every rank, also where a stage trains nothing.
    mx.eval(loss, grads, num_tokens)
    return dict(tree_flatten(grads))


def packed_rows(group: comm.Group) -> float:
    """Largest gradient error with packed documents, recomputed layers and training-time layers."""

    def loss(model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        hidden, head = hidden_and_head(model, batch["tokens"], batch["segments"])
        logits = head(hidden[:, :-1])
        losses = nn.losses.cross_entropy(logits, batch["tokens"][:, 1:])
        mask = batch["mask"][:, 1:]
        return mx.where(mask, losses, 0.0).sum(), mask.sum()

    batches = micro_batches(0, 0, 1, 2)
    for batch in batches:
        batch["segments"] = mx.broadcast_to(1 + (mx.arange(12) > 4).astype(mx.int32), (4, 12))
    whole = prepare_for_training(make_model("qwen3_5", num_hidden_layers=4)).train()
    cut = PipelineParallel(prepare_for_training(make_model("qwen3_5", num_hidden_layers=4)), group).train()
    checkpoint_layers(cut.layers)
    right = gradients_of(whole, loss, batches)
    return max(relative_error(grad, right[name]) for name, grad in gradients_of(cut, loss, batches).items())


def logits_loss(group: comm.Group) -> float:
    """Largest gradient error of a loss that shortens the tokens and uses `model(tokens)`."""

    def loss(model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        tokens = batch["tokens"][:, :-2]
        losses = nn.losses.cross_entropy(model(tokens), batch["tokens"][:, 1:-1])
        return losses.sum(), mx.array(losses.size)

    batches = micro_batches(0, 0, 1, 4)
    right = gradients_of(make_model("llama", num_hidden_layers=4), loss, batches)
    cut = PipelineParallel(make_model("llama", num_hidden_layers=4), group)
    return max(relative_error(grad, right[name]) for name, grad in gradients_of(cut, loss, batches).items())


def frozen_first_stage(group: comm.Group) -> float:
    """Largest gradient error when the first stage trains nothing."""
    models = [make_model("qwen3", num_hidden_layers=4) for _ in range(2)]
    for model in models:
        model.freeze()
        model.layers[-1].unfreeze()
    right = gradients_of(models[0], loss_fn, micro_batches(0, 0, 1, 4))
    found = gradients_of(PipelineParallel(models[1], group), loss_fn, micro_batches(0, 0, 1, 4))
    return max((relative_error(grad, right[name]) for name, grad in found.items()), default=0.0)


def refusals(group: comm.Group) -> dict[str, str]:
    """What is said when a pipeline is used wrongly; nothing may hang."""
    said = {}
    model, alone = PipelineParallel(make_model("qwen3"), group), PipelineParallel(make_model("qwen3"), comm.solo())
    tokens = rows_of(0)["tokens"]
    attempts = {
        "gradient": lambda: mx.eval(nn.value_and_grad(model, lambda m, t: m(t).sum())(model, tokens)),
        "hidden": lambda: hidden_and_head(model, tokens),
        "twice": lambda: value_and_grad(alone, _calls_twice)([rows_of(0)]),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value_and_grad(model, loss_fn)([rows_of(0)])
    said["warnings"] = " ".join(str(w.message) for w in caught)
    return said


def _calls_twice(model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
    hidden_and_head(model, batch["tokens"])
    return loss_fn(model, batch)


def large_messages(group: comm.Group) -> list[float]:
    """Seconds of a step of both schedules with hidden states of 32 MiB."""
    seconds = []
    for schedule in ("1f1b", "gpipe"):
        changes = {"hidden_size": 4096, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 8}
        model = make_model("qwen3", num_hidden_layers=group.size, **changes)
        model.freeze()
        for layer in model.layers:
            layer.input_layernorm.unfreeze()
        PipelineParallel(model, group, schedule=schedule)
        batch = {"tokens": mx.zeros((2048, 1), dtype=mx.int32)}
        started = time.monotonic()
        loss, grads, _ = value_and_grad(model, _sum_of_hidden)([batch] * 3)
        mx.eval(loss, grads)
        seconds.append(time.monotonic() - started)
    return seconds


def _sum_of_hidden(model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
    hidden, _ = hidden_and_head(model, batch["tokens"])
    return hidden.sum(), mx.array(1)


def bubble(group: comm.Group) -> dict[str, float]:
    """Measured idle time of a step whose stages sleep: equal work on both, whatever the cores do."""
    model = PipelineParallel(make_model("qwen3", num_hidden_layers=group.size), group)
    plain = PipelineStep.forward, PipelineStep.backward

    PipelineStep.forward = _slow(plain[0], FORWARD_SECONDS)
    PipelineStep.backward = _slow(plain[1], BACKWARD_SECONDS)
    measured = []
    for _ in range(3):
        mx.eval(value_and_grad(model, loss_fn)(micro_batches(0, 0, 1, 8)))
        measured.append(bubble_pct(model))
    PipelineStep.forward, PipelineStep.backward = plain
    return {"measured": min(measured), "theory": 100.0 * (group.size - 1) / (8 + group.size - 1)}


def _slow(method: Any, seconds: float) -> Any:
    """`method` that takes `seconds` of the stage's time."""

    def call(self: PipelineStep, i: int) -> None:
        busy, started = self.stage.busy_seconds, time.perf_counter()
        method(self, i)
        time.sleep(max(0.0, seconds - (time.perf_counter() - started)))
        self.stage.busy_seconds = busy + time.perf_counter() - started

    return call


def checkpoint_tensors(group: comm.Group) -> dict[str, Any]:
    """Tensors gathered over the stages against the whole model, and taken back by each stage."""
    whole = dict(tree_flatten(make_model("llama", num_hidden_layers=4).parameters()))
    cut = PipelineParallel(make_model("llama", num_hidden_layers=4), group)
    own = dict(tree_flatten(cut.parameters()))
    layout = model_layout(cut)
    gathered = dict(gather_tensors(layout, own.items(), group))
    back = dict(slice_tensors(layout, whole.items(), own))
    return {
        "in_order": list(gathered) == list(whole),
        "equal": all(mx.array_equal(gathered[name], whole[name]).item() for name in whole),
        "back": sorted(back) == sorted(own) and all(mx.array_equal(back[n], own[n]).item() for n in own),
    }


def stages_differ_in_optimizer(group: comm.Group) -> float:
    """Largest difference between the tied embeddings of the first and last stage after five updates."""
    model = PipelineParallel(make_model("llama", num_hidden_layers=4), group)
    optimizer, step = optim.AdamW(1e-2), value_and_grad(model, loss_fn)
    for i in range(5):
        _, grads, _ = step(micro_batches(i, 0, 1, 4))
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
    ends = group.rank in (0, group.size - 1)
    weight = model.model.embed_tokens.weight if ends else mx.zeros((128, 64))
    rows = group.all_gather(weight[None])
    return mx.abs(rows[0] - rows[-1]).max().item()


def sharded_errors(group: comm.Group, model: nn.Module, right: nn.Module) -> float:
    """Largest gradient error of a sharded model whose ranks share six rows."""
    rows = {k: v[:6] for k, v in rows_of(0).items()}
    mine = {k: v[group.rank :: group.size] for k, v in rows.items()}
    expected = gradients_of(right, loss_fn, [rows])
    found = dict(gather_tensors(model_layout(model), gradients_of(model, loss_fn, [mine]).items()))
    assert found.keys() == expected.keys(), "other parameters are trained"
    return max(relative_error(found[name], grad) for name, grad in expected.items())


def uneven_on_other_backends(group: comm.Group) -> dict[str, float]:
    """Sharded weights whose first dimensions three ranks do not divide, on this backend and on fakes of others."""
    groups = {group.backend: group, "nccl": fake_group(group, "nccl"), "jaccl": fake_group(group, "jaccl")}
    return {
        name: sharded_errors(other, FullyShardedDataParallel(make_model("qwen3"), other), make_model("qwen3"))
        for name, other in groups.items()
    }


def recomputed_layers(group: comm.Group) -> dict[str, float]:
    """Sharded weights with layers that are computed again, in both settings."""
    errors = {}
    for reshard in (True, False):
        model = FullyShardedDataParallel(make_model("qwen3_moe"), group, reshard_after_forward=reshard).train()
        checkpoint_layers(model.layers)
        errors[str(reshard)] = sharded_errors(group, model, make_model("qwen3_moe"))
    return errors

