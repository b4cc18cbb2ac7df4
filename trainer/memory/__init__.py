"""Memory that a recipe needs on each rank of a mesh, from shapes alone: no weight is made, nothing is evaluated.

Exact: weights, gradients and the optimizer's state (`placement`; the real wrappers divide the same way, but they
read weights). An estimate: the peak of a step beside them. The operations of a real step on one device are listed
with their shapes (`tracing`), each result gets a buffer for as long as MLX would keep it (`liveness`), and the peak is
scaled to the mesh (`footprint`): tensor parallelism divides all but the residual stream, a pipeline stage keeps its
layers' share for each micro-batch in flight. Not in it: what a device allocates ahead of time, kernels' scratch
space, fragments, the gradients of expert layers' weights while they are made.

Planned over measured on CPUs, models of more than 200 MB: 0.95 to 1.00 on one rank, 0.92 to 1.15 on two ranks of any
axis, but 1.21 where all weights are trained, replicated and not checkpointed.
"""

from .footprint import Footprint, MemoryPlan, plan_memory

__all__ = ["Footprint", "MemoryPlan", "plan_memory"]
