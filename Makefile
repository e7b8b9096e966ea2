# Two commands set everything up on a fresh machine: `make quickstart` and `make test`.
VENV ?= .venv
PYTHON ?= python3
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Most tests wait for processes to start, so several run at a time; those of a file share what it made, in one process.
PYTEST = python -m pytest --numprocesses logical --maxprocesses 8 --dist loadscope --no-loadscope-reorder

.PHONY: help install quickstart quickstart-vision test test-fast test-long test-cluster verify-kernels lint format bench tensorboard clean

help:
	@echo "make quickstart         train a twicing language model on Wikipedia summaries (5 minutes on two cores with AMX)"
	@echo "make quickstart-vision  train a twicing vision transformer on Fashion-MNIST"
	@echo "make test               the tests;  make test-fast  without the slow ones"
	@echo "make test-long          every ZeRO stage on every number of ranks, measured memory: minutes each"
	@echo "make test-cluster       several hosts, Slurm and many faults, on this machine, as root"
	@echo "make verify-kernels     everything that a CPU can say of the CUDA kernels (under 30 minutes on two cores)"
	@echo "make lint               ruff and mypy;  make format  ruff's formatter"
	@echo "make bench              time the attention backends on this machine"
	@echo "make tensorboard        watch the runs in runs/"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(VENV)/bin/python -m twicing_core.build
	@touch $@

quickstart: install
	python -m train.prepare text --source wikipedia-summaries --vocab-size 1024 --out data/wikipedia
	launch/local.sh configs/language/quickstart.yaml
	@launch/show_result.sh runs/quickstart quickstart-vision

quickstart-vision: install
	python -m train.prepare images --source fashion-mnist --out data/fashion-mnist
	launch/local.sh configs/vision/quickstart.yaml
	@launch/show_result.sh runs/quickstart-vision quickstart

test: install
	$(PYTEST) -m "not long and not cluster"

test-fast: install
	$(PYTEST) -m "not slow and not long and not cluster"

test-long: install
	$(PYTEST) -m long

test-cluster: install
	python -m pytest -m cluster

verify-kernels: install
	PYTHONPATH=. python tests/kernels/verify.py

lint: install
	ruff check .
	ruff format --check .
	mypy

format: install
	ruff check --fix .
	ruff format .

bench: install
	python -m twicing_core.bench

tensorboard: install
	tensorboard --logdir runs

clean:
	rm -rf $(VENV) build dist *.egg-info
