VENV := .venv
PYTHON := $(VENV)/bin/python
SHAPES := qwen3-8b smollm2 coder-0.5b group-of-one group-of-six group-of-eight wide-head fp8-cache
PARTS := race oracle kernels gate
race := tests/server/test_gpu_race.py
oracle := tests/server/test_gpu_oracle.py
kernels := tests/kernels
gate := tests/server/test_verify_gpu.py
GPU_JOBS := 4

.PHONY: install check format docs test try-sglang test-gpu gate-gpu gate-kernels gate-backend sanitize-gpu

install:  ## make the virtual environment and install everything, pinned
	./launch.sh --install-only

check:  ## lint, formatting and types
	$(VENV)/bin/ruff check --no-cache .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy examples/*.py

format:  ## rewrite in the project's style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs:  ## write the option tables of docs/cli.md
	$(PYTHON) -m tests.server.test_cli

test: check  ## all that a machine without a GPU can run; starts real servers
	$(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not gpu and not e2e and not slow"
	$(PYTHON) -m pytest -m "e2e and not gpu and not slow"

try-sglang:  ## install VERSION of SGLang beside this one, and say what moved: docs/upgrading.md
	$(PYTHON) -m tests.try_release $(VERSION)

# Each shape has a process of its own, as SGLang has one runner a process; they share the GPU.
test-gpu:  ## needs one NVIDIA GPU
	$(MAKE) -j$(GPU_JOBS) --output-sync=target $(PARTS:%=test-gpu-%) $(SHAPES:%=test-backend-%)

test-gpu-%:
	$(PYTHON) -m pytest -rP -m gpu $($*)

test-backend-%:
	LIM_TEST_SHAPE=$* $(PYTHON) -m pytest -m gpu tests/server/test_attention_backend.py

gate-gpu:  ## exactness of kernels and backend, before any timing; PYTHON=python3 without .venv
	$(PYTHON) -c "from lim_sglang.environment import project_commit; print('commit', project_commit())"
	$(MAKE) -j2 --output-sync=target gate-kernels gate-backend

gate-kernels:
	$(PYTHON) -m pytest -q -m gpu tests/server/test_verify_gpu.py

gate-backend:
	LIM_TEST_SHAPE=qwen3-8b $(PYTHON) -m pytest -q -m gpu tests/server/test_attention_backend.py

sanitize-gpu:  ## memory errors and races in the kernels' smallest cases
	compute-sanitizer --tool memcheck --error-exitcode 9 $(PYTHON) -m tests.kernels.sanitize
	compute-sanitizer --tool racecheck --error-exitcode 9 $(PYTHON) -m tests.kernels.sanitize
