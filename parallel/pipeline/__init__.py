"""Pipeline parallelism: how layers are split over stages, a model cut down to one, the schedule, and the step."""

from parallel.pipeline.cut import check_stages
from parallel.pipeline.pipeline_parallel import PipelineParallel, bubble_pct
from parallel.pipeline.split import check_split, even_split, machine_bytes, memory_split

__all__ = [
    "PipelineParallel",
    "bubble_pct",
    "check_split",
    "check_stages",
    "even_split",
    "machine_bytes",
    "memory_split",
]
