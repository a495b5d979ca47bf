VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: install check format test test-gpu

install:  ## make the virtual environment and install everything, pinned
	./launch.sh --install-only

check:  ## lint, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format:  ## rewrite in the project's style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: check  ## all that a machine without a GPU can run; starts real servers
	$(PYTHON) -m pytest -m "not gpu"

test-gpu:  ## needs one NVIDIA GPU
	$(PYTHON) -m pytest -m gpu
