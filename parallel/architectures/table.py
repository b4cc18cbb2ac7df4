"""What is known of one architecture, as data: how its blocks are divided, what its logits undergo, whether it can be cut.

A block is a module inside a layer that is entered once and left once (attention, an MLP); the linears, arrays and counts
inside it are named by their paths. `parallel.tensor`, `parallel.lm_head` and `parallel.pipeline` read this and do the work.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Part:
    """A stretch of a divided dimension.

    Attributes:
        units: Attribute of the block that counts what must stay in one piece (heads); None = single features.
        width: Attribute of the block with the features per unit; None = the dimension's even share.
    """

    units: str | None = None
    width: str | None = None


@dataclass(frozen=True)
class Cut:
    """How one child of a block is divided.

    Attributes:
        sharding: "all-to-sharded" | "sharded-to-all" (linears), or "slice": arrays along their first dimension.
        parts: The stretches of the divided dimension, in order.
        leaves: A "sharded-to-all" linear sums its result over the ranks; False where the block does.
    """

    sharding: str
    parts: tuple[Part, ...]
    leaves: bool = True


@dataclass(frozen=True)
class BlockPlan:
    """One kind of block.

    Attributes:
        name: The last name of the block's path.
        marker: A child that tells this kind from others of the same name.
        cuts: Path inside the block (a linear, another module, or an array) to how it is divided. A path that a
            model lacks is passed over.
        whole: Paths that every rank keeps; their gradients are summed over the ranks.
        counts: Attribute to the unit whose number it holds or is proportional to; becomes this rank's number.
        sizes: Attribute to the cut whose divided dimension it holds; becomes this rank's size.
        copied: Units that are held by several ranks when there are fewer of them than ranks.
        sums: The block's output is summed over the ranks (else its last linear has done it).
    """

    name: str
    marker: str
    cuts: Mapping[str, Cut]
    whole: tuple[str, ...] = ()
    counts: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    copied: tuple[str, ...] = ()
    sums: bool = False


@dataclass(frozen=True)
class ModelPlan:
    """An architecture: its kinds of blocks, and the last names of the input embedding and the output head."""

    blocks: tuple[BlockPlan, ...]
    embedding: str | None = "embed_tokens"
    head: str | None = "lm_head"


def columns(*parts: Part) -> Cut:
    """Outputs divided; the input is whole."""
    return Cut("all-to-sharded", parts or (Part(),))


def rows(*parts: Part, leaves: bool = True) -> Cut:
    """Inputs divided; the results are summed, by the linear or (leaves=False) by its block."""
    return Cut("sharded-to-all", parts or (Part(),), leaves)


def sliced(*parts: Part) -> Cut:
    """Arrays, or all arrays of a module, divided along their first dimension."""
    return Cut("slice", parts or (Part(),))


@dataclass(frozen=True)
class Architecture:
    """One row: an architecture by its `model_type`.

    Attributes:
        tensor: What tensor parallelism divides; None = it cannot be divided by a table.
        logits: From the text model's arguments to what its logits undergo after the projection, as settings of `Head`;
            None = not known, so a loss runs the whole model.
        staged: Its pipeline stages are proven equal to the whole model.
    """

    tensor: ModelPlan | None = None
    logits: Callable[[Any], dict[str, Any]] | None = None
    staged: bool = False


def plain(args: Any) -> dict[str, Any]:
    """Logits as the projection gives them."""
    return {}


def softcapped(args: Any) -> dict[str, Any]:
    """Logits bounded by a tanh (Gemma 2)."""
    return {"softcap": args.final_logit_softcapping}


def scaled(args: Any) -> dict[str, Any]:
    """Logits times a factor (Cohere)."""
    return {"scale": args.logit_scale}


def divided(args: Any) -> dict[str, Any]:
    """Logits divided by a number (Granite)."""
    return {"scale": 1.0 / args.logits_scaling}
