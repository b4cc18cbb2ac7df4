"""What needs several ranks: collectives on known numbers, meshes against one rank, latency and bandwidth."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx

import comm
from parallel import clip_grad_norm
from trainer.build import build
from trainer.selftest.models import filled, recipe_of, write_rows
from trainer.selftest.operations import relative_distance
from trainer.selftest.outcome import Check

SECTION = "ranks"
BOUND = 1e-4


def rank_checks(world: comm.Group, folder: Path) -> list[Check]:
    """Empty on one rank. Every rank makes and runs the same ones.

    Args:
        world: All ranks.
        folder: This rank's own, for rows.
    """
    if world.size == 1:
        return []
    write_rows(folder)
    n = world.size
    collectives = [Check(SECTION, name, 0.0, partial(_off_by, call, wanted)) for name, call, wanted in _collectives(world)]
    axes = [{axis: n} for axis in ("dp_replicate", "dp_shard", "tp", "pp")]
    meshes = [
        Check(SECTION, f"Qwen3, {', '.join(f'{axis}={size}' for axis, size in mesh.items())}", BOUND,
              partial(_mesh_distance, world, folder, mesh))
        for mesh in axes
    ]  # fmt: skip
    return [*collectives, *meshes, Check(SECTION, "latency and bandwidth", None, partial(_link, world))]


def _collectives(world: comm.Group) -> list[tuple[str, Callable[[], mx.array], mx.array]]:
    n, rank = world.size, world.rank
    ranks = mx.arange(n)
    return [
        ("all_sum", lambda: world.all_sum(mx.array([rank, 1])), mx.array([n * (n - 1) // 2, n])),
        ("all_max", lambda: world.all_max(mx.array([rank, -rank])), mx.array([n - 1, 0])),
        ("all_gather", lambda: world.all_gather(mx.array([rank])), ranks),
        ("reduce_scatter", lambda: world.reduce_scatter(ranks), mx.array([n * rank])),
        ("broadcast", lambda: world.broadcast(mx.array([rank + 7])), mx.array([7])),
        ("all_sum of 16 MiB", lambda: world.all_sum(mx.ones(2**22))[-1:], mx.array([float(n)])),
    ]


def _off_by(call: Callable[[], mx.array], wanted: mx.array) -> tuple[float, str]:
    return comm.number(mx.abs(call() - wanted).max().astype(mx.float32)), ""


def _mesh_distance(world: comm.Group, folder: Path, mesh: dict[str, int]) -> tuple[float, str]:
    """Loss and norm of a step on a mesh, from those of the same step on one rank."""
    shape = {"global_batch_size": 2 * world.size, "method": "full"}
    found = []
    for group, parallel in ((comm.solo(), {}), (world, {"dp_replicate": 1} | mesh)):
        recipe = recipe_of(folder, "Qwen3", shape | {"batch_size_per_device": 1, "parallel": parallel})
        run = filled(build(recipe, group, lambda line: None, compile_step=False))
        loss, grads, _ = run.step_fn(run.batches.make(0).arrays())
        _, norm = clip_grad_norm(grads, None, run.model)
        mx.eval(loss, norm)
        found.append({"loss": loss, "norm": norm})
    errors = {name: relative_distance(found[1][name], found[0][name]) for name in found[0]}
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def _link(world: comm.Group) -> tuple[None, str]:
    fit = comm.measure_link(world)
    rate = f", {1e-9 / fit.seconds_per_byte:.2f} GB/s" if fit.seconds_per_byte else ""
    return None, f"{1e6 * fit.latency_seconds:.0f} us{rate}"
