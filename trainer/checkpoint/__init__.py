"""The folder of checkpoints, a run's state saved and resumed, and who may write there."""
