# Each target first builds .venv if it is missing or older than the files that define it.
PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
INSTALLED := .venv/.installed
# torch, Captum and Triton are not fully typed.
MODEL_TYPES := --allow-any-generics --no-warn-return-any --allow-subclassing-any --allow-untyped-decorators

.PHONY: demo serve web test test-slow test-containers test-kubernetes bench bench-engine bench-deadlines bench-questions bench-stream bench-server lint quality localisation refusals constraints image-requirements clean

# NETWORK=lite0|imagenet|shapes|PATH chooses the network of demo, serve and web.
demo: $(INSTALLED)
	$(BIN)/python -m tools.demo $(IMAGE)

serve: $(INSTALLED)
	exec $(BIN)/python -m tools.server

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and not containers and not kubernetes" $(ARGS)

# The images and the compose project, by a Docker engine of the tests' own; as root. CONTAINERS=FOLDER keeps its data.
test-containers: $(INSTALLED)
	$(BIN)/python -m pytest -m containers tests/deploy $(ARGS)

# The manifests on a cluster, under load: KUBECONFIG=FILE IMAGE=NAME:TAG make test-kubernetes. tests/deploy/test_kubernetes.py
# says how to get both with kind or k3s.
test-kubernetes: $(INSTALLED)
	$(BIN)/python -m pytest -m kubernetes tests/deploy/test_kubernetes.py $(ARGS)

# A server and a page that explains pictures, http://127.0.0.1:7860/; both end with Ctrl-C.
web: $(INSTALLED)
	exec $(BIN)/python -m tools.web $(ARGS)

# One report of all benchmarks, out/bench/report.md: under 40 minutes on 2 cores, under 5 with ARGS=--quick.
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

# Whether answers keep their deadlines, and how errors fall with longer ones.
bench-deadlines: $(INSTALLED)
	$(BIN)/python -m tools.bench.deadlines $(ARGS)

# What further questions about one picture cost: other classes, a lower tolerance, the same again.
bench-questions: $(INSTALLED)
	$(BIN)/python -m tools.bench.questions $(ARGS)

# Time to a stream's prediction while other clients' gradients load the machine.
bench-stream: $(INSTALLED)
	$(BIN)/python -m tools.bench.stream $(ARGS)

# The whole server against a FastAPI service around Captum, over the wire.
bench-server: $(INSTALLED)
	$(BIN)/python -m tools.bench.server $(ARGS)

# Errors of each rule and each tolerance against the integral: hours on a CPU; it continues where it was interrupted.
# NETWORK=lite0 uses crops of photographs; the default is the network of drawn shapes.
quality: $(INSTALLED)
	$(BIN)/python -m tools.quality $(ARGS)

# Share of the heat on the shapes, over 200 held-out images.
localisation: $(INSTALLED)
	$(BIN)/python -m tools.evaluation.localisation

# Write docs/refusals.md, refused requests and their messages, from a server's answers.
refusals: $(INSTALLED)
	$(BIN)/python -m tools.refusals

$(INSTALLED): pyproject.toml client/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 14) else "Python 3.10 to 3.13 is needed, not " + sys.version.split()[0] + "; set PYTHON")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python .venv --constraints constraints.txt --requirements pyproject.toml --group dev --editable ./client
	touch $@

# Resolve the pins of pyproject.toml and client/pyproject.toml again, and from them what the images install.
constraints: $(INSTALLED)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --upgrade \
		--group dev --output-file constraints.txt pyproject.toml client/pyproject.toml
	$(MAKE) image-requirements

# The same pins with the hashes of their files, for the images: their Python is 3.11 or newer.
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --generate-hashes \
	--no-build --constraints constraints.txt
image-requirements: $(INSTALLED)
	$(LOCK) --output-file tools/deploy/requirements-server.txt pyproject.toml
	echo setuptools | $(LOCK) --output-file tools/deploy/requirements-client.txt client/pyproject.toml -
	echo uv==$(UV_VERSION) | $(LOCK) --output-file tools/deploy/requirements-uv.txt -

clean:
	rm -rf .venv out model_repository/classifier/1/* model_repository/*/labels.txt client/src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
