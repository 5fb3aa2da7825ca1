"""Local training: what a client does with its data in a round."""
