"""Starting a program on every rank: host files, the job, an agent on each host. Nothing here imports MLX."""
