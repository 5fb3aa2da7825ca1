"""hedgerow: federated fine-tuning of large language models.

Start with `hedgerow.experiment.load` and `hedgerow.engines.local.run`, or with the command line.
"""

__version__ = "0.1.0"
