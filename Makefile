# Each target builds .venv first where it is missing or older than what defines it.
PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
INSTALLED := .venv/.installed
# What comes from torch, Captum and Triton has no types.
MODEL_TYPES := --allow-any-generics --no-warn-return-any --allow-subclassing-any --allow-untyped-decorators

.PHONY: demo serve test test-slow bench bench-engine bench-deadlines bench-stream bench-server lint quality localisation refusals constraints clean

# NETWORK=lite0|imagenet|shapes|PATH chooses what these two serve.
demo: $(INSTALLED)
	$(BIN)/python -m tools.demo $(IMAGE)

serve: $(INSTALLED)
	exec $(BIN)/python -m tools.server

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(ARGS)

# One report of everything, in under 40 minutes on 2 cores: out/bench/report.md; ARGS=--quick takes under 5.
bench: $(INSTALLED)
	$(BIN)/python -m tools.bench $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for model in explain_stream heatmap integrated_gradients preprocess; do $(BIN)/mypy $(MODEL_TYPES) model_repository/$$model/1 || exit 1; done

# The engine against Captum, in one process.
bench-engine: $(INSTALLED)
	$(BIN)/python -m tools.bench.engine $(ARGS)

# Whether answers keep their deadlines, and what a longer one buys.
bench-deadlines: $(INSTALLED)
	$(BIN)/python -m tools.bench.deadlines $(ARGS)

# When a stream's prediction comes while other clients' gradients fill the machine.
bench-stream: $(INSTALLED)
	$(BIN)/python -m tools.bench.stream $(ARGS)

# The whole server against a FastAPI service around Captum, over the wire.
bench-server: $(INSTALLED)
	$(BIN)/python -m tools.bench.server $(ARGS)

# How far each rule and each tolerance is from the integral: hours on a CPU; it goes on where it was interrupted.
# NETWORK=lite0 takes crops of photographs; the default is the network of drawn shapes.
quality: $(INSTALLED)
	$(BIN)/python -m tools.quality $(ARGS)

# How much of the heat lies on the shapes, over 200 held-out images.
localisation: $(INSTALLED)
	$(BIN)/python -m tools.evaluation.localisation

# What is refused and what the answer says: docs/refusals.md, as a server answers now.
refusals: $(INSTALLED)
	$(BIN)/python -m tools.refusals

$(INSTALLED): pyproject.toml client/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 14) else "Python 3.10 to 3.13 is needed, not " + sys.version.split()[0] + "; set PYTHON")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python .venv --constraints constraints.txt --requirements pyproject.toml --group dev --editable ./client
	touch $@

# Resolve anew what pyproject.toml and client/pyproject.toml leave open.
constraints: $(INSTALLED)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --upgrade \
		--group dev --output-file constraints.txt pyproject.toml client/pyproject.toml

clean:
	rm -rf .venv out model_repository/classifier/1/* model_repository/*/labels.txt client/src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
