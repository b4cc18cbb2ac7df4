"""Training-time replacements for mlx-lm layers that are slow, or keep too much, when gradients are taken.

Everything here is plain MLX with hand-written backward passes, so it runs on Metal, CUDA and the CPU alike.
Inference code of mlx-lm is left as it is: `prepare_for_training` changes one model object, and only what it does
in training.
"""
