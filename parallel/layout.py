"""How a model's parameters are split over groups of ranks, and the way from full tensors to slices and back.

Whoever splits a parameter records it on the module that owns it (`record_split`); `model_layout` collects the
records under full parameter names. Gradient norms, checkpoints and other wrappers read that; a name that is
absent is whole and equal on every rank. A dim is of an array, an axis of the mesh.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

import comm


@dataclass(frozen=True)
class Segment:
    """One stretch of a dimension that is divided evenly on its own, such as the keys of a fused query-key-value.

    Attributes:
        size: Length in the full tensor.
        copies: How many neighbouring ranks hold the same piece (key heads, when there are fewer than ranks).
    """

    size: int
    copies: int = 1


@dataclass(frozen=True)
class Split:
    """One parameter dimension divided over the ranks of a group.

    A dimension of one segment need not divide evenly: slices are then padded with zeros at the end.

    Attributes:
        axis: Name of the mesh axis, "tp" or "dp_shard".
        group: The ranks of that axis.
        dim: The array dimension that is divided (not negative).
        segments: The stretches of that dimension in order; every rank holds one piece of each.
    """

    axis: str
    group: comm.Group
    dim: int
    segments: tuple[Segment, ...]

    @property
    def full_size(self) -> int:
        """Length of the divided dimension in the full tensor."""
        return sum(segment.size for segment in self.segments)

    @property
    def local_size(self) -> int:
        """Length of the divided dimension on one rank."""
        return sum(self.piece_sizes)

    @property
    def piece_sizes(self) -> list[int]:
        """Length of this rank's piece of each segment, equal on all ranks; the last pieces may end in padding."""
        return [-(-segment.size * segment.copies // self.group.size) for segment in self.segments]

    @property
    def has_copies(self) -> bool:
        """Whether some segment is held by more than one rank of the group."""
        return any(segment.copies > 1 for segment in self.segments)

    def slice(self, full: mx.array) -> mx.array:
        """This rank's slice of a full tensor, in its own buffer once evaluated."""
        if self.group.size == 1:
            return full
        pieces, start = [], 0
        for segment, size in zip(self.segments, self.piece_sizes):
            first = start + (self.group.rank // segment.copies) * size
            pieces.append(_range(full, self.dim, first, first + size))
            start += segment.size
        whole = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=self.dim)
        if whole.shape[self.dim] < self.local_size:
            widths = [(0, 0)] * whole.ndim
            widths[self.dim] = (0, self.local_size - whole.shape[self.dim])
            whole = mx.pad(whole, widths)
        # A bare slice would keep the full tensor's buffer alive.
        return mx.contiguous(whole)

    def gather(self, local: mx.array) -> mx.array:
        """The full tensor from every rank's slice, equal on all ranks. Every rank of the group must call it."""
        if self.group.size == 1:
            return local
        ranks = list(mx.split(self.group.all_gather(local, axis=self.dim), self.group.size, axis=self.dim))
        if len(self.segments) == 1:
            whole = mx.concatenate(ranks[:: self.segments[0].copies], axis=self.dim)
            return _range(whole, self.dim, 0, self.full_size)
        by_rank = [self.pieces(rank) for rank in ranks]
        pieces = [p[i] for i, s in enumerate(self.segments) for p in by_rank[:: s.copies]]
        return mx.concatenate(pieces, axis=self.dim)

    def pieces(self, local: mx.array) -> list[mx.array]:
        """The pieces of the segments in this rank's slice."""
        bounds = _bounds(self.piece_sizes)
        return [_range(local, self.dim, first, last) for first, last in bounds]

    def shares(self) -> mx.array:
        """`(local_size,)` float32: 1 / (ranks that hold it) for each index of the local slice."""
        parts = [mx.full((n,), 1.0 / s.copies) for s, n in zip(self.segments, self.piece_sizes)]
        return mx.concatenate(parts)


@dataclass(frozen=True)
class ParameterLayout:
    """All splits of one parameter, the first one applied to the full tensor, the next to its slice, and so on.

    Attributes:
        splits: The splits, outermost first; a later wrapper appends its own.
    """

    splits: tuple[Split, ...]

    @property
    def groups(self) -> dict[str, comm.Group]:
        """Mesh axis name to group, for every axis that splits the parameter."""
        return {split.axis: split.group for split in self.splits}

    def slice(self, full: mx.array) -> mx.array:
        """This rank's slice of the full tensor."""
        for split in self.splits:
            full = split.slice(full)
        return full

    def gather(self, local: mx.array) -> mx.array:
        """The full tensor, on every rank of the groups; all of them must call it, in the same order."""
        for split in reversed(self.splits):
            local = split.gather(local)
        return local

    def full_shape(self, local_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the full tensor."""
        shape = list(local_shape)
        for split in reversed(self.splits):
            shape[split.dim] = split.full_size
        return tuple(shape)

    def squared_sum(self, local: mx.array) -> mx.array:
        """Float32 scalar whose sum over all `groups` is the sum of squares of the full tensor."""
        squares = local.astype(mx.float32).square()
        for index, split in enumerate(self.splits):
            if not split.has_copies:
                continue
            shares = split.shares()
            for inner in self.splits[index + 1 :]:
                if inner.dim == split.dim:
                    shares = inner.slice(shares.reshape([-1 if d == inner.dim else 1 for d in range(local.ndim)]))
            squares = squares * shares.reshape([-1 if d == split.dim else 1 for d in range(local.ndim)])
        return squares.sum()


def record_split(module: nn.Module, name: str, split: Split) -> None:
    """Note on `module` that its own array `name` has been split; splits add up in the order of the calls."""
    splits = module.__dict__.setdefault("_splits", {})
    splits[name] = (*splits.get(name, ()), split)


def split_records(module: nn.Module) -> dict[str, tuple[Split, ...]]:
    """The recorded splits of the arrays that `module` itself owns."""
    return module.__dict__.get("_splits", {})


def model_layout(model: nn.Module) -> dict[str, ParameterLayout]:
    """Parameter name to layout, for every parameter of `model` that is split."""
    layout = {}
    for path, module in model.named_modules():
        for name, splits in split_records(module).items():
            if name in module:
                layout[f"{path}.{name}" if path else name] = ParameterLayout(splits)
    return layout


def gather_tensors(
    layout: dict[str, ParameterLayout], tensors: Iterable[tuple[str, mx.array]], stages: comm.Group | None = None
) -> Iterator[tuple[str, mx.array]]:
    """Full tensors under the same names, one at a time, each evaluated before the next is begun.

    Args:
        layout: The layout of the model, from `model_layout`.
        tensors: Names and local tensors, in the same order on every rank of the groups that split them.
            Optimizer moments go under the name of their parameter.
        stages: The pipeline's group, whose ranks have different names: then every rank gets those of all
            stages, in the order of the stages; a tensor that two stages have comes once. Default: no pipeline.
    """
    if stages is not None and stages.size > 1:
        yield from _gather_stages(layout, list(tensors), stages)
        return
    for name, local in tensors:
        full = layout[name].gather(local) if name in layout else local
        mx.eval(full)
        yield name, full


def _gather_stages(
    layout: dict[str, ParameterLayout], tensors: list[tuple[str, mx.array]], stages: comm.Group
) -> Iterator[tuple[str, mx.array]]:
    own = [(n, layout[n].full_shape(x.shape) if n in layout else x.shape, str(x.dtype)) for n, x in tensors]
    seen = set()
    for owner, entries in enumerate(comm.all_gather_object(own, stages)):
        mine = gather_tensors(layout, tensors) if owner == stages.rank else None
        for name, shape, dtype in entries:
            # The owner's groups gather even what comes twice, all of them alike.
            full = next(mine)[1] if mine else mx.zeros(shape, dtype=getattr(mx, dtype.rsplit(".", 1)[-1]))
            if name in seen:
                continue
            seen.add(name)
            full = stages.broadcast(full, owner)
            mx.eval(full)
            yield name, full


def slice_tensors(
    layout: dict[str, ParameterLayout], tensors: Iterable[tuple[str, mx.array]], names: Container[str] | None = None
) -> Iterator[tuple[str, mx.array]]:
    """The way back from `gather_tensors`: this rank's slices of full tensors, one at a time.

    Args:
        layout: The layout of the model, from `model_layout`.
        tensors: Names and full tensors.
        names: Those that this rank has; others are passed over. Default: all.
    """
    for name, full in tensors:
        if names is not None and name not in names:
            continue
        local = layout[name].slice(full) if name in layout else full
        mx.eval(local)
        yield name, local


def _range(x: mx.array, dim: int, first: int, last: int) -> mx.array:
    return x[(slice(None),) * dim + (slice(first, last),)]


def _bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [(end - size, end) for end, size in zip(ends, sizes)]
