"""Which parts of an architecture tensor parallelism divides, and along what: one table per architecture.

Pure data. A block is a module inside a layer that is entered once and left once (attention, an MLP); the
linears, arrays and counts inside it are named by their paths. `parallel.tensor` reads the tables and does the
work. Adding an architecture is adding an entry to `PLANS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """A stretch of a divided dimension.

    Attributes:
        units: attribute of the block that counts what must stay in one piece (heads); None = single features.
        width: attribute of the block with the features per unit; None = the dimension's even share.
    """

    units: str | None = None
    width: str | None = None


@dataclass(frozen=True)
class Cut:
    """How one child of a block is divided.

    Attributes:
        sharding: "all-to-sharded" | "sharded-to-all" (linears), or "slice": arrays along their first dimension.
        parts: the stretches of the divided dimension, in order.
        leaves: a "sharded-to-all" linear sums its result over the ranks; False where the block does.
    """

    sharding: str
    parts: tuple[Part, ...]
    leaves: bool = True


@dataclass(frozen=True)
class BlockPlan:
    """One kind of block.

    Attributes:
        name: the last name of the block's path.
        marker: a child that tells this kind from others of the same name.
        cuts: path inside the block (a linear, another module, or an array) to how it is divided. A path that a
            model lacks is passed over.
        whole: paths that every rank keeps; their gradients are summed over the ranks.
        counts: attribute to the unit whose number it holds or is proportional to; becomes this rank's number.
        sizes: attribute to the cut whose divided dimension it holds; becomes this rank's size.
        copied: units that are held by several ranks when there are fewer of them than ranks.
        sums: the block's output is summed over the ranks (else its last linear has done it).
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


def attention(query_heads: str, key_heads: str) -> BlockPlan:
    """Softmax attention with separate projections; its counts are in the attributes named here."""
    query, key = Part(query_heads), Part(key_heads)
    return BlockPlan(
        name="self_attn",
        marker="q_proj",
        cuts={"q_proj": columns(query), "k_proj": columns(key), "v_proj": columns(key), "o_proj": rows(query)},
        whole=("q_norm", "k_norm", "rope"),
        counts={query_heads: query_heads, key_heads: key_heads},
        copied=(key_heads,),
    )


_QUERY, _KEY = Part("n_heads", "head_dim"), Part("n_kv_heads", "head_dim")
FUSED_ATTENTION = BlockPlan(
    name="self_attn",
    marker="qkv_proj",
    cuts={"qkv_proj": columns(_QUERY, _KEY, _KEY), "o_proj": rows(Part("n_heads"))},
    whole=("rope",),
    counts={"n_heads": "n_heads", "n_kv_heads": "n_kv_heads"},
    copied=("n_kv_heads",),
)

_LINEAR_KEY, _LINEAR_VALUE = Part("num_k_heads", "head_k_dim"), Part("num_v_heads", "head_v_dim")
_BY_VALUE_HEAD = Part("num_v_heads")
GATED_DELTA_NET = BlockPlan(
    name="linear_attn",
    marker="in_proj_qkv",
    cuts={
        "in_proj_qkv": columns(_LINEAR_KEY, _LINEAR_KEY, _LINEAR_VALUE),
        "conv1d": sliced(_LINEAR_KEY, _LINEAR_KEY, _LINEAR_VALUE),
        "in_proj_z": columns(_BY_VALUE_HEAD),
        "in_proj_b": columns(_BY_VALUE_HEAD),
        "in_proj_a": columns(_BY_VALUE_HEAD),
        "A_log": sliced(_BY_VALUE_HEAD),
        "dt_bias": sliced(_BY_VALUE_HEAD),
        "out_proj": rows(_BY_VALUE_HEAD),
    },
    whole=("norm",),
    counts={
        "num_k_heads": "num_k_heads",
        "num_v_heads": "num_v_heads",
        "key_dim": "num_k_heads",
        "value_dim": "num_v_heads",
    },
    sizes={"conv_dim": "conv1d", "conv1d.groups": "conv1d"},
    copied=("num_k_heads",),
)

MLP = BlockPlan(
    name="mlp", marker="gate_proj", cuts={"gate_proj": columns(), "up_proj": columns(), "down_proj": rows()}
)
FUSED_MLP = BlockPlan(
    name="mlp", marker="gate_up_proj", cuts={"gate_up_proj": columns(Part(), Part()), "down_proj": rows()}
)
# Every rank has a slice of every expert, so all ranks route alike and their loads are equal.
EXPERTS = BlockPlan(
    name="mlp",
    marker="switch_mlp",
    cuts={
        "switch_mlp.gate_proj": columns(),
        "switch_mlp.up_proj": columns(),
        "switch_mlp.down_proj": rows(leaves=False),
        "shared_expert.gate_proj": columns(),
        "shared_expert.up_proj": columns(),
        "shared_expert.down_proj": rows(leaves=False),
    },
    whole=("gate", "shared_expert_gate"),
    sums=True,
)

_LLAMA = ModelPlan((attention("n_heads", "n_kv_heads"), MLP, EXPERTS))
_QWEN3_5 = ModelPlan((attention("num_attention_heads", "num_key_value_heads"), GATED_DELTA_NET, MLP, EXPERTS))

# model_type, as the model's config and `model.model_type` have it
PLANS: dict[str, ModelPlan] = {
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_5_text": _QWEN3_5,
    "gemma3": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": ModelPlan((FUSED_ATTENTION, FUSED_MLP)),
    "smollm3": _LLAMA,
}
