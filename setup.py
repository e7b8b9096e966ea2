"""Everything declarative is in pyproject.toml; the attention's compiled kernels will be built from here."""

from setuptools import setup

setup()
