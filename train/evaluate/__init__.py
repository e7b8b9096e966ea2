"""Measuring a trained model: validation metrics, baselines to hold them against, and generated text."""
