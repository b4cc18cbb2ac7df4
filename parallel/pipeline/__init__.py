"""Pipeline parallelism: cutting a model into stages, the schedule, and the step."""
