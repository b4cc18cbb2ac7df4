"""The one table of architectures: a row per `model_type`, a file per family.

To add one, open the family's file (or a new one, joined below) and write its row. For a Llama-like model of the made-up
type "lynx", whose MLP has its two inputs in one matrix and whose logits are multiplied by a factor:

    LYNX = ModelPlan((attention("n_heads", "n_kv_heads"), FUSED_MLP))
    ROWS = {"lynx": Architecture(LYNX, scaled)}

`blocks.attention` takes the attributes in which mlx-lm's block keeps its numbers of heads; a block of another shape is a
`BlockPlan` that names each linear and how it is divided, and what every rank keeps whole. `staged` is set once the parity
tests of the pipeline pass. Then the type goes into the cases of `tests/helpers/tensor_cases.py` and
`tests/parallel/pipeline/mesh_launch.py`, which compare loss, every gradient and the steps with the plain model. What training,
opening and exporting know of it (packing, names) stands in `trainer.model.architectures`.
"""

from parallel.architectures import gemma, llama, phi, qwen
from parallel.architectures.table import Architecture, BlockPlan, Cut, ModelPlan, Part, columns, rows, sliced

# model_type, as the model's config and `model.model_type` have it
ARCHITECTURES: dict[str, Architecture] = {**gemma.ROWS, **llama.ROWS, **phi.ROWS, **qwen.ROWS}

__all__ = ["ARCHITECTURES", "Architecture", "BlockPlan", "Cut", "ModelPlan", "Part", "columns", "rows", "sliced"]
