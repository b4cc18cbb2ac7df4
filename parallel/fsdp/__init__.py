"""FSDP: weights divided for storage, and gathered where they are used."""
