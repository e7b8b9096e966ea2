"""Training of twicing transformers: everything between shards and a trained model."""

__version__ = "0.1.0"
