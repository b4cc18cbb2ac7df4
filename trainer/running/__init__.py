"""A run from its recipe to what it leaves: the one place that the command line and research code start it from."""
