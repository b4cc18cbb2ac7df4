"""Phi 3 and 4: projections in one matrix. Read from mlx-lm 0.32.2."""

from parallel.architectures.blocks import FUSED_ATTENTION, FUSED_MLP
from parallel.architectures.table import Architecture, ModelPlan, plain

ROWS = {
    "phi3": Architecture(ModelPlan((FUSED_ATTENTION, FUSED_MLP)), plain, staged=True),
}
