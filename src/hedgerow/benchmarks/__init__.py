"""Benchmarks from elsewhere: lm-evaluation-harness, and MT-bench with its judges."""
