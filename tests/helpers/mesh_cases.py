"""Training on any mesh compared with one device: cases, models, the steps, and what a rank reports."""

import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

import comm
from double_precision import in_float64
from parallel import (
    DataParallel,
    FullyShardedDataParallel,
    PipelineParallel,
    TensorParallel,
    gather_tensors,
    model_layout,
    value_and_grad,
)
from tensor_cases import loss_fn, relative_error, train_on, worst
from tensor_models import make_model, prepare

ROWS, TOKENS, NUM_LAYERS = 8, 12, 4
ROUNDING = 1e-6  # an error that a float32 gradient of this size may have by chance


@dataclass(frozen=True)
class Case:
    """What is trained, on which mesh, how."""

    architecture: str
    method: str
    dp_replicate: int = 1
    dp_shard: int = 1
    pp: int = 1
    tp: int = 1
    micro_batches: int = 4
    schedule: str = "1f1b"
    split: str | tuple[int, ...] = "even"
    num_steps: int = 3
    reshard: bool = True
    wide: bool = False  # float32 itself is further than the bound from float64: compare both with that

    @property
    def name(self) -> str:
        """For test ids."""
        axes = "x".join(f"{axis}{n}" for axis in ("dp_replicate", "dp_shard", "pp", "tp") if (n := getattr(self, axis)) > 1)
        extra = "".join(f"-{x}" for x in (self.schedule, self.split) if x not in ("1f1b", "even"))
        return f"{self.architecture}-{self.method}-{axes}{extra}{'' if self.reshard else '-kept'}"

    @property
    def reference(self) -> str:
        """Name of the run on one device."""
        return f"{self.architecture}-{self.method}{'-wide' if self.wide else ''}"

    @property
    def num_ranks(self) -> int:
        """Size of the mesh."""
        return self.dp_replicate * self.dp_shard * self.pp * self.tp

    def model(self) -> nn.Module:
        """The whole model, equal in every process."""
        model = make_model(self.architecture, num_hidden_layers=NUM_LAYERS)
        return prepare(model, self.method)


def rows_of(step: int) -> dict[str, mx.array]:
    """A global batch: random tokens, with some rows shorter than others, so that ranks have unequal target counts."""
    tokens = mx.random.randint(0, 128, (ROWS, TOKENS), key=mx.random.key(100 + step))
    positions = mx.arange(TOKENS)[None]
    mask = (positions > 0) & (positions < TOKENS - mx.arange(ROWS)[:, None] % 5)
    return {"tokens": tokens, "mask": mask, "segments": mx.ones((ROWS, TOKENS), dtype=mx.int32)}


def micro_batches(step: int, index: int, ranks: int, count: int) -> list[dict[str, mx.array]]:
    """The share of one data-parallel rank."""
    each = ROWS // ranks // count
    first = index * each * count
    rows = rows_of(step)
    return [{k: v[first + m * each : first + (m + 1) * each] for k, v in rows.items()} for m in range(count)]


def save_reference(case: Case, folder: Path) -> None:
    """Train on one device and keep losses, norms and first gradients."""
    model = case.model().train()
    grads = _gradients(model, case)
    if case.wide:
        with in_float64(case.model().train()) as double:
            exact = _gradients(double, case)
        mx.savez(str(folder / f"{case.reference}.npz"), **exact)
    losses, norms = train_on(model, lambda i: micro_batches(i, 0, 1, case.micro_batches), case.num_steps)
    mx.save_safetensors(str(folder / f"{case.reference}.safetensors"), grads)
    (folder / f"{case.reference}.json").write_text(json.dumps({"losses": losses, "norms": norms}))


def _gradients(model: nn.Module, case: Case) -> dict[str, mx.array]:
    _, grads, _ = value_and_grad(model, loss_fn)(micro_batches(0, 0, 1, case.micro_batches))
    mx.eval(grads)
    return dict(tree_flatten(grads))


def rounding_ratio(grads: dict[str, mx.array], one: dict[str, mx.array], exact: dict[str, mx.array]) -> tuple[str, float]:
    """The worst tensor's distance from float64, as a multiple of one process's own distance (at least ROUNDING)."""
    with mx.stream(mx.cpu):
        wide = {name: [x.astype(mx.float64) for x in (grad, one[name])] for name, grad in grads.items()}
        errors = {name: [relative_error(x, exact[name]) for x in pair] for name, pair in wide.items()}
    return worst({name: mine / max(other, ROUNDING) for name, (mine, other) in errors.items()})


def wrap(model: nn.Module, case: Case, mesh: comm.Mesh) -> nn.Module:
    """All wrappers that the case asks for, in the order in which they go."""
    if case.pp > 1:
        PipelineParallel(model, mesh.pp, schedule=case.schedule, split=case.split)
    if case.tp > 1:
        TensorParallel(model, mesh.tp)
    if case.dp_shard > 1:
        FullyShardedDataParallel(model, mesh.dp_shard, reshard_after_forward=case.reshard)
    if case.dp_replicate > 1:
        DataParallel(model, mesh.dp_replicate)
    return model.train()


def compare(case: Case, folder: Path, mesh: comm.Mesh) -> dict[str, Any]:
    """A rank's errors against one device."""
    started = time.monotonic()
    right = json.loads((folder / f"{case.reference}.json").read_text())
    right_grads = mx.load(str(folder / f"{case.reference}.safetensors"))
    model = wrap(case.model(), case, mesh)

    def batches(step: int) -> list[dict[str, mx.array]]:
        return micro_batches(step, mesh.dp.rank, mesh.dp.size, case.micro_batches)

    _, grads, num_tokens = value_and_grad(model, loss_fn)(batches(0))
    grads = dict(gather_tensors(model_layout(model), tree_flatten(grads)))
    errors = {name: relative_error(grad, right_grads[name]) for name, grad in grads.items()}
    losses, norms = train_on(model, batches, case.num_steps)
    exact = mx.load(str(folder / f"{case.reference}.npz")) if case.wide else {}
    return {
        "rounding": rounding_ratio(grads, right_grads, exact) if case.wide and grads else ("", 0.0),
        "names": sorted(grads),
        "gradient": worst(errors) if errors else ("", 0.0),
        "tokens": num_tokens.item(),
        "steps": max(abs(a / b - 1) for a, b in zip(losses, right["losses"])),
        "norms": max(abs(a / b - 1) for a, b in zip(norms, right["norms"])),
        "seconds": time.monotonic() - started,
    }


def run_cases(cases: list[Case], folder: Path, world: comm.Group) -> dict[str, Any]:
    """All cases of one launch; meshes are built once."""
    meshes: dict[tuple[int, ...], comm.Mesh] = {}
    results = {}
    for case in cases:
        axes = (case.dp_replicate, case.dp_shard, case.pp, case.tp)
        if axes not in meshes:
            meshes[axes] = comm.Mesh.build(comm.MeshShape(*axes), world)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            results[case.name] = compare(case, folder, meshes[axes])
    return results


def to_json(cases: list[Case]) -> str:
    """Cases as an argument of a worker."""
    return json.dumps([asdict(case) for case in cases])


def from_json(text: str) -> list[Case]:
    """The way back."""
    entries = [{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()} for entry in json.loads(text)]
    return [Case(**entry) for entry in entries]
