"""Measurements of the whole: `twicing_core.bench` times the attention alone, these what a user of it gets."""
