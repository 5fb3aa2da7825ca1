"""Evaluation: the test data, and what a model scores on them."""
