"""The training loop and what it is made of: step inputs, loss, optimizer, validation, progress, requests."""
