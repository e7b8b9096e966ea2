"""The models. They know nothing of data, DeepSpeed or the training loop."""
