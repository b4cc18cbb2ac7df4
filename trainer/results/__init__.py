"""What a run leaves: final weights, mlx-lm's and PEFT's formats, the model card; and opening it again."""
