# One environment in .venv for every target. The CPU build of torch 2.13.0 is what the tests run
# on; `make TORCH=torch==2.12.0 ...` takes another, TORCH=torch the newest (CUDA, several GB).
TORCH ?= torch==2.13.0
# `make clean test KERAS=keras==3.13.0` tests on another Keras than the newest that is supported.
KERAS ?= keras
PYTHON ?= python3
RANKS ?= 2
BIN = .venv/bin

.PHONY: demo test check bench clean

demo: .venv/run
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m keras_tp.examples.train_transformer

test: .venv/test
	$(BIN)/python -m pytest

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/bench
	$(BIN)/python benchmarks/local_shapes.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Each file stands for one installation; torch comes first, so that nothing pulls in another build.
.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)" "$(KERAS)"
	touch $@

.venv/run .venv/test .venv/dev .venv/bench: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".$(if $(filter-out run,$(@F)),[$(@F)])"
	touch $@
