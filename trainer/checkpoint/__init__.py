"""The folder of checkpoints, a run's state saved and taken up again, and who may write there."""
