"""What may be asked for: the recipe and its dataclasses, how they are filled, the rules between keys, and problems in words.

Nothing here loads a model, rows or MLX; it imports nothing else of the trainer.
"""
