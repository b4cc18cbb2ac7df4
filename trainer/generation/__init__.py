"""Answers of a model: held-out rows and their reference answers."""
