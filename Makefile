# Each target first creates a virtual environment in .venv with the pinned versions, unless it exists.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# OpenMP threads that spin while they wait make PyTorch 10 to 40 times slower on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-gpu demo-tensorrt test fuzz lint format clean docker test-gpu

demo: $(READY)  ## SmolLM2 with a trained drafter: convert, build, run, compare
	$(BIN)/python scripts/demo.py

demo-gpu: $(READY)  ## Qwen2.5-Coder-1.5B with a trained drafter, the same way; for a GPU, but runs anywhere
	$(BIN)/python scripts/demo.py qwen2.5-coder-1.5b-instruct

demo-tensorrt: $(READY)  ## SmolLM2 compiled for an RTX 4090 without one, and its networks proved by onnxruntime
	$(BIN)/python scripts/demo_tensorrt.py

test: $(READY)
	$(BIN)/python -m pytest

fuzz: $(READY)  ## the C++ kernels under sanitizers, a long campaign; `make test` runs a short one
	REDRAFTER_FUZZ_ROUNDS=$${REDRAFTER_FUZZ_ROUNDS:-3000} $(BIN)/python -m pytest -rs tests/native

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $(READY)

docker:  ## images for GPU hosts: build and serve
	docker build --file docker/Dockerfile --target build --tag trtllm-redrafter:build .
	docker build --file docker/Dockerfile --target serve --tag trtllm-redrafter:serve .

# Uses the host's Python, not .venv: TensorRT-LLM and the torch it was built for are installed there.
test-gpu:  ## on a GPU host with TensorRT-LLM: build a tiny model, run it, compare it
	$(PYTHON) -m pip list --format=freeze > .host-packages.tmp
	$(PYTHON) -m pip install --quiet --constraint .host-packages.tmp --editable . pytest hypothesis
	rm .host-packages.tmp
	$(PYTHON) -m pytest -m gpu -rs tests/gpu
