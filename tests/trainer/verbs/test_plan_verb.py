"""The verb `plan`: what it says about meshes, and that it needs a config only."""

import json

import mlx.core as mx
import pytest

from comm import MeshShape
from planned_models import CONFIGS, QWEN3, make
from trainer.__main__ import main
from trainer.verbs.plan import GIB, Machine, Planner

# A model of a trillion parameters in the shape of Kimi-K2.6's config, whose experts are stored in 4 bits.
KIMI = {
    "model_type": "kimi_k25",
    "text_config": {
        "model_type": "kimi_k2",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "vocab_size": 163840,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 384,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": [
                "lm_head",
                "re:.*self_attn.*",
                "re:.*shared_experts.*",
                r"re:.*mlp\.(gate|up|down)_proj.*",
            ],
        },
    },
}


@pytest.fixture
def recipe_for(tmp_path):
    def recipe_for(config: dict, more: str = "") -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"model: {{path: {tmp_path}}}\ndata: {{train: synthetic:sql, max_seq_len: 32}}\n{more}"
        )
        return str(path)

    return recipe_for


def test_a_folder_with_a_config_is_enough(recipe_for, capsys):
    """A plan that wants weights or a tokenizer before it says whether they would fit."""
    assert main(["plan", recipe_for(QWEN3), "--world", "4", "--memory-gib", "8"]) == 0
    out = capsys.readouterr().out
    assert "dp_replicate=4 fits in 8.0 GiB" in out
    assert "Cheapest that fits: " in out and "parallel.tp=" in out


def test_a_mesh_that_does_not_fit_gets_advice(recipe_for, capsys):
    """A refusal that does not say what to change."""
    assert main(["plan", recipe_for(QWEN3, "method: full"), "--world", "2", "--memory-gib", "0.0001"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "gradient_checkpointing=true" in out and "method=lora" in out


def test_errors_are_messages(recipe_for, tmp_path, capsys):
    """A traceback for a folder without config, or for an architecture that mlx-lm lacks."""
    assert main(["plan", recipe_for({"model_type": "no_such_model", "vocab_size": 8})]) == 2
    assert "no_such_model" in capsys.readouterr().err
    assert main(["plan", recipe_for(QWEN3), f"model.path={tmp_path / 'empty'}"]) == 2
    path = recipe_for(QWEN3)
    (tmp_path / "config.json").unlink()
    assert main(["plan", path]) == 2
    assert "has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, world, reason",
    [
        (["parallel.tp=3"], 3, "cannot be divided over tp = 3 ranks"),
        (["parallel.tp=4", "model.quantize={bits: 4, group_size: 64}"], 4, "not a multiple of group_size = 64"),
        (["parallel.pp=6"], 6, "5 layers cannot be cut into 6 stages"),
        (["parallel.pp=2", "parallel.split=[1, 1]"], 2, "split [1, 1] has 2 stages and 2 layers"),
    ],
)
def test_validate_refuses_what_the_model_cannot_be_divided_over(recipe_for, capsys, changes, world, reason):
    """A mesh that is found impossible only when every machine has loaded the model."""
    path = recipe_for(QWEN3)
    assert main(["validate", path, *changes, "--world", str(world)]) == 2
    assert reason in capsys.readouterr().err
    assert main(["validate", path, "parallel.pp=2", "parallel.tp=2", "--world", "4"]) == 0


def test_a_trillion_parameters_are_counted_without_weights():
    """Weights made in memory, or experts of 4 bits counted as 16."""
    recipe, planned = make(KIMI, model={"config": KIMI, "tokenizer": "bpe:8", "dtype": "bfloat16"})
    planner = Planner(recipe, planned, Machine(512 * GIB, 15e12, 1e9))
    parts = planner.memory.parts
    assert 550 * GIB < sum(part.num_bytes for part in parts if not part.trainable) < 640 * GIB
    assert 30e9 < planner._token_flops.forward / 2 < 40e9
    assert mx.get_active_memory() < GIB


def test_slow_links_make_traffic_expensive():
    """A cheapest mesh that does not depend on the link, or a mesh that cannot run among the choices."""
    recipe, planned = make(CONFIGS["qwen3"], method="full")
    by_link = {}
    for link in (1e3, 1e13):
        planner = Planner(recipe, planned, Machine(GIB, 1e9, link, message_seconds=0.0))
        choices, _ = planner.others(MeshShape(dp_replicate=4), 4)
        assert all(
            choice.mesh.world == 4 and choice.accumulation * choice.mesh.dp == 16 for choice in choices
        )
        by_link[link] = choices[0]
    assert by_link[1e3].sent_bytes <= by_link[1e13].sent_bytes
    assert by_link[1e3].seconds > by_link[1e13].seconds


def test_meshes_that_cannot_run_are_left_out_with_the_reason():
    """A plan that recommends what the run then refuses."""
    recipe, planned = make(CONFIGS["qwen3"], method="full")
    planner = Planner(recipe, planned, Machine(GIB, 1e9, 1e9))
    choices, reasons = planner.others(MeshShape(dp_replicate=3), 1)
    assert all(choice.mesh.tp == 1 for choice in choices)
    assert any("tp=3" in reason and "cannot be divided" in reason for reason in reasons)
