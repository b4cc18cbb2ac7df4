"""Blocks that several families share: attention, gated delta nets, MLPs and experts."""

from parallel.architectures.table import BlockPlan, ModelPlan, Part, columns, rows, sliced


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

LLAMA = ModelPlan((attention("n_heads", "n_kv_heads"), MLP, EXPERTS))
