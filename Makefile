# One environment in .venv for every target, installed anew when one of these changes. torch 2.13.0
# is what the tests run on: `make TORCH=torch demo` takes the newest, `make KERAS=keras==3.13.0 test`
# another Keras.
TORCH ?= torch==2.13.0
KERAS ?= keras
HUB ?= keras-hub==0.32.0
PYTHON ?= python3
RANKS ?= 2
TRIALS ?= 9
BIN = .venv/bin

.PHONY: demo demo-api test test-slow test-hub test-jax fuzz layers check bench faults clean FORCE

demo: .venv/run
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m keras_tp.examples.train_transformer

demo-api: .venv/run
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m keras_tp.examples.distribution_api

test: .venv/test
	$(BIN)/python -m pytest

# Writes tests/layers.md, with which the tests compare what they find.
layers: .venv/test
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_layers.py --write-layers

test-hub: .venv/hub
	$(BIN)/python -m pytest -n 0 tests/hub

test-jax: .venv/jax
	$(BIN)/python -m pytest -n 0 -m slow tests/test_jax.py  # -n 0: JAX runs once

# What takes too long for every change: more of KerasHub's models, the benchmarks themselves.
test-slow: .venv/hub .venv/test
	$(BIN)/python -m pytest -n 0 -m slow tests/hub tests/test_benchmarks.py tests/test_examples.py

# Thousands of layout maps at random, of which `make test` tries some.
fuzz: .venv/test
	$(BIN)/python -m pytest -n 0 -m slow tests/test_random_layouts.py

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/bench
	$(BIN)/python benchmarks/local_shapes.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/costs.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/parity.py --float64

# Kills ranks of a small job anywhere, and starts it again: TRIALS=60 for a few minutes of it.
faults: .venv/run
	$(BIN)/python benchmarks/faults.py --trials $(TRIALS)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Each file stands for one installation, the first for what is asked for, written where that
# changes. torch comes before the package, so that nothing pulls in another build.
.venv/wanted: FORCE
	@mkdir -p .venv
	@echo "$(TORCH) $(KERAS) $(HUB)" | cmp -s - $@ || echo "$(TORCH) $(KERAS) $(HUB)" > $@

.venv/torch: .venv/wanted
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "$(TORCH)" "$(KERAS)"
	touch $@

.venv/run .venv/test .venv/jax .venv/dev .venv/bench: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".$(if $(filter-out run,$(@F)),[$(@F)])"
	touch $@

# KerasHub asks for TensorFlow, which its models on torch do not use: it comes without what it asks
# for, and the extra has what it imports. (pip says so whenever it installs something later.)
.venv/hub: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[hub]"
	$(BIN)/python -m pip install --quiet --no-deps "$(HUB)"
	touch $@
