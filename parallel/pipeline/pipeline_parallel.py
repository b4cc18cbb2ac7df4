"""PipelineParallel: consecutive layers on each rank, hidden states and their gradients passed between neighbours.

`stages.py` cuts the model, `schedule.py` says who does what when, `pipeline_step.py` does it, and `stage.py`
has the messages.
Letters: B rows, L tokens, D hidden dims, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import comm
from comm.typed import named_arrays, number
from parallel.api import Batch, LossFn
from parallel.extension import take_back
from parallel.lm_head import is_tied, text_model
from parallel.pipeline.caches import own_caches
from parallel.pipeline.cut import check_stages, cut_model
from parallel.pipeline.schedule import plan_actions
from parallel.pipeline.split import choose_split
from parallel.pipeline.stage import Stage
from parallel.pipeline.step import PipelineStep
from parallel.wrapper import Wrapper, parallel_state, without_gradient


class PipelineParallel(Wrapper):
    """Cut an mlx-lm model into stages, one per rank of `group`; `parallel.value_and_grad` runs them.

    Loss, gradients (of the stage's own parameters), evaluation and generated tokens are those of the whole
    model. The first stage has the embedding, the last one norm, head and loss, and layers keep their numbers.
    Nothing is evaluated here: with a model loaded `lazy=True`, other stages' layers are never read. Put
    adapters in before, other wrappers around it.

    A `loss_fn` may use the model once, as `model(tokens)` or `parallel.hidden_and_head`. Every stage runs it
    up to there, so that shapes, segments and dropout keys agree; only the last stage runs the rest.

    Args:
        module: The model; the same object is returned.
        group: The stages, in order. Default: the world of `comm.init()`.
        schedule: "1f1b" (a stage holds at most `stages - rank` micro-batches) | "gpipe" (all of them).
        split: "even" | "memory" (by the memory of each machine) | layers per stage.
        peers: Groups whose ranks must cut alike; see `stages.choose_split`.

    Raises:
        ValueError: An unknown architecture, schedule or split; a backend that cannot send between ranks.

    Source: Narayanan et al., Megatron-LM (arXiv 2104.04473).
    """

    def __init__(
        self,
        module: nn.Module,
        group: comm.Group | None = None,
        *,
        schedule: str = "1f1b",
        split: str | Sequence[int] = "even",
        peers: Sequence[comm.Group] = (),
    ):
        group = comm.init() if group is None else group
        try:
            _check_backend(group)
            plan_actions(schedule, 0, 1, 1)
            check_stages(self)
            counts = choose_split(self, split, group, peers)
        except ValueError:
            # Nothing is cut yet: leave the module as it was given.
            take_back(self)
            raise
        self.join("pp", group)
        state = self.parallel_state
        first = sum(counts[: group.rank])
        own = range(first, first + counts[group.rank])
        shared = _shared_names(self) if group.size > 1 else []
        passage = cut_model(self, own, sum(counts))
        self.stage = Stage(group, own, passage, schedule, shared)
        state.runner = self._runner
        state.forward = self._forward
        state.loss_groups.append(group)
        state.repeated = frozenset(shared if passage.is_last and not passage.is_first else ())

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None = None, **options: Any) -> mx.array:
        """Logits `(B, L, V)` for tokens `(B, L)`, on every rank; all of them must call it.

        Hidden states travel at once, the logits only when they are evaluated. They have no gradient: train
        with `parallel.value_and_grad`.
        """
        stage = self.stage
        if stage.passage.state != "closed":
            return super().__call__(inputs, cache=cache, **options)
        incoming = stage.receive(inputs.shape)
        result = stage.run(lambda: super(PipelineParallel, self).__call__(inputs, cache=cache, **options), incoming)
        if not stage.passage.is_last:
            stage.send(result)
        logits = stage.share_logits(result if stage.passage.is_last else None, inputs.shape)
        return without_gradient(logits, [p for _, p in named_arrays(self.trainable_parameters())], "A pipeline has no gradient through model(tokens); train with parallel.value_and_grad.")

    def make_cache(self) -> list[Any]:
        """Key-value caches for generation: real ones for this stage's layers, stand-ins for the others."""
        from mlx_lm.models.cache import KVCache

        base = super()
        caches = base.make_cache() if hasattr(base, "make_cache") else [KVCache() for _ in self.layers]
        return own_caches(caches, self.stage.own)

    def _runner(self, loss_fn: LossFn) -> Callable:
        def run(micro_batches: Sequence[Batch]) -> tuple[mx.array, mx.array, Any]:
            return PipelineStep(self, loss_fn, micro_batches).run()

        return run

    def _forward(self, loss_fn: LossFn, model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
        """One batch of an evaluation: its loss on the last stage, zeros on the others."""
        stage, phases = self.stage, parallel_state(model).phases
        incoming = stage.receive_for(loss_fn, model, batch)
        with phases.recording() as trace:
            result = stage.run(lambda: loss_fn(model, batch), incoming)
        phases.evaluate_forward(trace, result)
        if stage.passage.is_last:
            return result
        stage.send(result)
        return mx.array(0.0), mx.array(0)


def bubble_pct(model: nn.Module) -> float:
    """Share of the stages' time, in percent, that the latest step spent waiting. Every rank must call it.

    Theory, for balanced stages: (stages - 1) / (micro-batches + stages - 1).
    """
    stage: Stage = model.stage
    busy = number(stage.group.all_sum(mx.array(stage.busy_seconds))) / stage.group.size
    return 100.0 * (1.0 - busy / number(stage.group.all_max(mx.array(stage.step_seconds))))


def _check_backend(group: comm.Group) -> None:
    if group.size > 1 and group.capabilities.point_to_point == "none":
        raise ValueError(
            f"PipelineParallel sends between ranks, which {group.backend} cannot; give it a ring or MPI group "
            f"(in a recipe: parallel.backend: {{pp: ring}})."
        )


def _shared_names(model: nn.Module) -> list[str]:
    """Names of the parameters that the whole model uses both to embed and as its head."""
    if not is_tied(model):
        return []
    module = text_model(model).model.embed_tokens
    path = next(path for path, other in model.named_modules() if other is module)
    return [f"{path}.{name}" for name, _ in named_arrays(module.parameters())]
