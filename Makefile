# make harden   set up .venv, then harden the bundled model (20 minutes on 2 cores)
# make test     set up .venv, then run the fast tests
# System packages: Python 3.11 or newer with venv (Debian: apt-get install python3 python3-venv), make, git.
PYTHON ?= python3
BIN := .venv/bin
# Two cores without a GPU generate faster in two processes than in two threads. (Asked for `harden` only, after `setup`.)
ONE_PROCESS = $(BIN)/python -c 'import os, sys, torch; sys.exit(not torch.accelerator.is_available() and os.cpu_count() > 1)'
# Without a GPU, CPUs that have no bfloat16 instructions compute in float32.
NO_GPU = $(BIN)/python -c 'import sys, torch; sys.exit(torch.accelerator.is_available())'
PRECISION = $(shell $(NO_GPU) && ! grep -qs bf16 /proc/cpuinfo && echo --model.dtype float32)
ALONE = --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
LAUNCH = $(BIN)/accelerate launch -q \
	$(shell $(ONE_PROCESS) || echo --config_file recipes/accelerate/one_machine_cpu.yaml)

.PHONY: harden align planted setup test test-slow check

harden: setup
	$(LAUNCH) harden/train.py --config recipes/smollm2-135m/harden.yaml $(PRECISION)

align: setup
	$(BIN)/accelerate launch -q harden/train.py --config recipes/smollm2-135m/align.yaml

planted: setup
	$(BIN)/accelerate launch -q $(ALONE) harden/train.py --config recipes/planted/harden.yaml

test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --editable '.[dev]' -c constraints.txt
	touch $@
