"""What a training step minimises: one file per objective, and a table of them."""
