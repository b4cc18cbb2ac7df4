"""A model to train: opened, made trainable by LoRA, DoRA or in full, and its operations counted."""
