"""TensorParallel: every layer's weights divided over a group, with the outputs and gradients of the whole model.

Each rank computes every token with its slice of the heads and features. What is divided is in `plans.py`; how
a linear is, in `linear.py`; the vocabulary, in `vocab.py`. All ranks of the group must be given the same batch.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

import comm
from comm.typed import named_arrays
from parallel.architectures import ModelPlan
from parallel.extension import extend, take_back
from parallel.layout import Segment, split_records
from parallel.tensor.linear import Sharding, SlicedLinear, linear_dims, partial_slots, shard_in_place
from parallel.tensor.replicated import Slot, copied_to_group
from parallel.tensor.resolve import BlockSite, check_plan, child_at, find_blocks, find_named, plan_for
from parallel.tensor.slicing import SlicedModule, remember_whole, slice_array
from parallel.tensor.vocab import shard_embedding, shard_head
from parallel.wrapper import Wrapper


class TensorParallel(Wrapper):
    """Divide an mlx-lm model over `group`; outputs, gradients and generated tokens are those of the whole model.

    Per dense layer two activation-sized sums in the forward pass and two in the backward pass. Gradients of
    `nn.value_and_grad` are final: each rank has those of its slices, and equal ones of what is not divided.
    LoRA and DoRA layers may be there already, or come later through mlx-lm's `linear_to_lora_layers` or a
    layer's `to_lora` and `to_dora`. Load the model with `lazy=True`: a rank then never holds more than its
    slices and the tensors of one layer's linear.

    Args:
        module: The model; the same object is returned.
        group: Ranks that divide it, at the same random seed. Default: the world of `comm.init()`.
        plan: What is divided. Default: the table of the model's architecture in `parallel.architectures`.

    Raises:
        ValueError: No plan for the architecture; or something that the group's size does not divide, before
            anything is loaded, with the sizes that work.

    Source: Shoeybi et al., Megatron-LM (arXiv 1909.08053).
    """

    def __init__(self, module: nn.Module, group: comm.Group | None = None, *, plan: ModelPlan | None = None):
        group = comm.init() if group is None else group
        try:
            plan = plan_for(self) if plan is None else plan
            check_plan(self, plan, group.size)
        except ValueError:
            # Nothing is divided yet: leave the module as it was given.
            take_back(self)
            raise
        self.join("tp", group)
        for site in find_blocks(self, plan):
            _shard_block(site, group)
        _shard_vocabulary(self, plan, group)
        for _, array in named_arrays(self.parameters()):
            mx.eval(array)


class ShardedBlock(nn.Module):
    """A block that enters the split region once, with its input and all parameters whose gradients are partial.

    Forward: one sum over the group where the block or its last linear leaves the region. Backward: one sum of
    the input's gradient, and one message with those of the parameters. Mixed into the block's own class.
    """

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """As the block that it was: `x` `(..., D)`, equal on all ranks, first."""
        region = self.split_region
        with copied_to_group(region.slots(self), region.group):
            y = super().__call__(comm.copy_to_group(x, region.group), *args, **kwargs)
        return comm.sum_over_group(y, region.group) if region.sums else y


class SplitRegion:
    """What a sharded block knows of its children.

    Args:
        site: The block and its plan.
        group: The ranks.
    """

    def __init__(self, site: BlockSite, group: comm.Group):
        self.path = site.path
        self.group = group
        self.sums = site.plan.sums
        self._cuts = [path for path, _, _ in site.cuts()]
        self._linears = [path for path, child, cut in site.cuts() if cut.sharding != "slice"]
        self._whole = [path for path in site.plan.whole if child_at(site.module, path) is not None]
        self._seen: list[Any] = []
        self._slots: list[Slot] = []

    def slots(self, block: nn.Module) -> list[Slot]:
        """The parameters below `block` whose gradients on one rank are only a part."""
        children = [child_at(block, path) for path in (*self._linears, *self._whole)]
        # Adapters may have taken the place of a child since the last call.
        if len(children) != len(self._seen) or any(a is not b for a, b in zip(children, self._seen)):
            self._slots = self._find_slots(block)
            self._seen = children
        return self._slots

    def _find_slots(self, block: nn.Module) -> list[Slot]:
        slots: list[Slot] = [slot for path in self._whole for slot in _arrays_below(child_at(block, path))]
        for path in self._cuts:
            child = child_at(block, path)
            owner = child if isinstance(child, nn.Module) else block
            if path not in self._linears:
                records = split_records(owner).items()
                slots += [(owner, name) for name, splits in records if any(split.has_copies for split in splits)]
            elif isinstance(child, SlicedLinear):
                slots += partial_slots(child)
            else:
                raise ValueError(
                    f"{self.path}.{path} has become a {type(child).__name__} that is not sharded. Put adapters in "
                    f"before TensorParallel, or build them with the layer's to_lora or to_dora."
                )
        return slots


def _shard_block(site: BlockSite, group: comm.Group) -> None:
    block, size = site.module, group.size
    sizes = {}
    for path, child, cut in list(site.cuts()):
        segments = site.segments(child, cut, size)
        sizes[path] = sum(s.size * s.copies // size for s in segments)
        if isinstance(child, mx.array):
            slice_array(block, path, 0, segments, group)
        elif cut.sharding == "slice":
            _slice_module(child, segments, group)
        else:
            spec = Sharding(cut.sharding, group, *linear_dims(child), segments, enters=False, leaves=cut.leaves)
            shard_in_place(child, spec)
        # One child at a time, and nothing else refers to its whole tensors any more: they are freed here.
        mx.eval(child.parameters() if isinstance(child, nn.Module) else block[path])
        mx.clear_cache()
    region = SplitRegion(site, group)
    local = {units: _local_count(site, units, size) for units in set(site.plan.counts.values())}
    for attribute, units in site.plan.counts.items():
        setattr(block, attribute, getattr(block, attribute) * local[units][0] // local[units][1])
    for attribute, path in site.plan.sizes.items():
        *owner_path, name = attribute.split(".")
        setattr(child_at(block, owner_path[0]) if owner_path else block, name, sizes[path])
    block.split_region = region
    extend(block, ShardedBlock)


def _slice_module(module: nn.Module, segments: tuple[Segment, ...], group: comm.Group) -> None:
    remember_whole(module, group)
    for name in list(module):
        slice_array(module, name, 0, segments, group)
    extend(module, SlicedModule)


def _local_count(site: BlockSite, units: str, size: int) -> tuple[int, int]:
    count = getattr(site.module, units)
    return count * site.copies(units, size) // size, count


def _shard_vocabulary(model: nn.Module, plan: ModelPlan, group: comm.Group) -> None:
    for name, shard in ((plan.embedding, shard_embedding), (plan.head, shard_head)):
        _, module = find_named(model, name) or (None, None)
        # An embedding inside an adapter layer stays whole: its input and output are, so its gradients are too.
        if module is not None and ("weight" in module or shard is shard_head):
            shard(module, group)
            mx.eval(module.parameters())
            mx.clear_cache()


def _arrays_below(child: Any) -> list[Slot]:
    modules = [module for _, module in child.named_modules()]
    return [(m, name) for m in modules for name, value in m.items() if isinstance(value, mx.array) and name[0] != "_"]
