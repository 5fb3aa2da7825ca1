"""Bundled: a tiny pretrained model and its tasks, for the demo, smoke variants and tests."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""Folder of the bundled model, in Hugging Face format."""
