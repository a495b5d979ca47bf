VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: install check format test test-gpu gate-gpu

install:  ## make the virtual environment and install everything, pinned
	./launch.sh --install-only

check:  ## lint, formatting and types
	$(VENV)/bin/ruff check --no-cache .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format:  ## rewrite in the project's style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: check  ## all that a machine without a GPU can run; starts real servers
	$(PYTHON) -m pytest -m "not gpu"

test-gpu:  ## needs one NVIDIA GPU; backend tests run once for each of FlashInfer's decode kernels
	$(PYTHON) -m pytest -m gpu tests/gpu
	LIM_TEST_SHAPE=coder-0.5b $(PYTHON) -m pytest -m gpu tests/gpu/test_backend.py

gate-gpu:  ## exactness of kernels and backend, before any timing; PYTHON=python3 without .venv
	$(PYTHON) -c "from lim_sglang.provenance import project_commit; print('commit', project_commit())"
	$(PYTHON) -m pytest -q -m gpu tests/gpu/test_gate.py tests/gpu/test_backend.py
