# The front door. Every target checks its variables before it installs, downloads or starts anything.
#
#   PEFT      lora | qlora | ia3 | prefix           MODEL  smollm2-135m | gpt-2 | llama-7b | org/name | a folder
#   NGPU      number of processes on each machine   DATA   cafe | a data file | a folder of texts | org/name
#   STRATEGY  auto | single | ddp | zero1 | zero2 | zero3 | zero3-offload
#   RUN       name of the run folder under runs/
#   HARDWARE  a box to plan for: 4x24GB             PROBE  yes: plan with a few real steps
#   NNODES    number of machines, NODE_RANK this one's number, MASTER_ADDR where they meet (docs/cluster.md)
#   HOLD      merged | 4bit | adapters (serving)    DTYPE  auto | bf16 | fp32 (serving)
#   LISTEN    host:port, serve over tcp as well     METRICS  port of this machine for Prometheus
#   CONNECT   host:port, chat with a daemon there   ADAPTER  who answers; to load: a run folder
#   SYSTEM    what the model reads before a chat
#   SET       any option: SET="optim.lr=2e-4 batch.size=32", for serving SET="serve.slots=8"
#   RUNS      several runs, to compare or to serve together: RUNS="one another"
#   ONLY      one stress program: make stress ONLY=fuzz ARGS="SEED=7 MESSAGES=4000"

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PEFT ?=
MODEL ?=
NGPU ?=
DATA ?=
STRATEGY ?=
RUN ?=
RUNS ?=
HARDWARE ?=
PROBE ?=
NNODES ?=
HOLD ?=
DTYPE ?=
LISTEN ?=
METRICS ?=
CONNECT ?=
ADAPTER ?=
ARGS ?=
SET ?=
ONLY ?=
given = $(foreach name,$(1),$(if $($(name)),'$(name)=$($(name))'))
# Where machines meet may stand in a cluster's environment; it is meant when there are several, or when it is typed.
MEETING = $(foreach name,NODE_RANK MASTER_ADDR MASTER_PORT,$(if $(NNODES)$(filter command,$(origin $(name))),$(name)))
TRAIN_ARGS = $(call given,PEFT MODEL NGPU DATA STRATEGY RUN HARDWARE PROBE NNODES $(MEETING)) $(SET)
SERVED = $(or $(RUN),$(notdir $(or $(MODEL),smollm2-135m))-$(or $(PEFT),lora))
SERVED_ARGS = $(if $(RUNS)$(CONNECT),$(call given,RUN RUNS),'RUN=$(SERVED)')
SERVE_ARGS = $(SERVED_ARGS) $(call given,HOLD DTYPE NGPU LISTEN METRICS ADAPTER CONNECT) $(SET)
# An environment may have a SYSTEM of its own; it is meant when it is typed.
ASKED = $(if $(filter command,$(origin SYSTEM)),--system='$(subst ','\'',$(SYSTEM))')
INFER_ARGS = $(SERVE_ARGS) $(ASKED)
CHAT_ARGS = $(if $(CONNECT),,START=yes) $(INFER_ARGS)
# Without a name, what is served is found.
ASK_ARGS = $(call given,RUN ADAPTER CONNECT)
IMAGE ?= afinar

.DEFAULT_GOAL := help
# In the order written, also under make -j: first the check, then the set-up, then the rest.
.NOTPARALLEL:
.PHONY: help setup dependencies variables train plan data eval compare two-runs serve chat infer status load unload \
  stop keys check-serve check-chat check-infer test test-fast stress check bench bench-serve build shell

help: ## list the targets and variables
	@sed -n 's/^#   /  /p' Makefile; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## create .venv from requirements.lock

# What takes minutes: the image keeps it apart from the sources, which change more often.
dependencies: $(INSTALLED)

$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python 3.11 or newer is needed, this is $$($(PYTHON) -V); try make PYTHON=python3.11 ..." >&2; exit 2; }
	@echo "setting up $(VENV) from requirements.lock (once) …"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --requirement requirements.lock
	@touch $@

$(READY): $(INSTALLED) pyproject.toml
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

variables:
	@$(PYTHON) -m launcher.variables $(TRAIN_ARGS)

train: | variables setup ## fine-tune; resumes an interrupted run
	@$(PY) -m launcher train $(TRAIN_ARGS)

plan: | variables setup ## show what train would do: strategy, memory and time, for this box or for HARDWARE=4x24GB
	@$(PY) -m launcher plan $(TRAIN_ARGS)

data: | variables setup ## show what train would learn from: counts, and one example with its trained part marked
	@$(PY) -m launcher data $(TRAIN_ARGS)

eval: | variables setup ## measure a finished run beside its base
	@$(PY) -m launcher eval $(TRAIN_ARGS)

compare: | two-runs setup ## several runs side by side: make compare RUNS="one another"
	@$(PY) -m launcher compare 'RUNS=$(RUNS)'

two-runs:
	@test -n '$(word 2,$(RUNS))' \
	  || { echo 'error: RUNS="$(RUNS)": a comparison takes two different runs or more; try RUNS="one another"' >&2; exit 2; }

# The system's Python checks the variables of serving, too.
check-serve check-chat check-infer: check-%:
	@$(PYTHON) -m launcher.variables $(call given,PEFT MODEL RUN)
	@$(PYTHON) -m serve.arguments $(if $(filter serve,$*),daemon $(SERVE_ARGS),$* $(if $(filter chat,$*),$(CHAT_ARGS),$(INFER_ARGS)))

serve: | check-serve setup ## hold a finished run, or several, in memory for clients
	@$(PY) -m serve daemon $(SERVE_ARGS)

chat: | check-chat setup ## talk to a run; starts its daemon if none runs
	@$(PY) -m serve chat $(CHAT_ARGS)

infer: | check-infer setup ## daemon and terminal together, both gone at /quit
	@$(PY) -m serve infer $(INFER_ARGS)

status: | setup ## what a daemon is doing: slots, queue, speed, adapters, memory
	@$(PY) -m serve status $(ASK_ARGS)

load: | setup ## give a daemon one more run: make load ADAPTER=runs/another
	@$(PY) -m serve load $(ASK_ARGS)

unload: | setup ## take a run from a daemon: make unload ADAPTER=another
	@$(PY) -m serve unload $(ASK_ARGS)

stop: | setup ## end a daemon when its open requests are answered
	@$(PY) -m serve stop $(ASK_ARGS)

keys: | setup ## key pairs for serving over tcp
	@$(PY) -m serve keys

# One worker a core; a file stays together, and files with long tests come first.
TESTS := $(PY) -m pytest -q -n logical --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

test: | setup ## the whole suite
	@$(TESTS)

test-fast: | setup ## the quick part of the suite
	@$(TESTS) -m "not slow"

stress: | setup ## kills, signals, fuzz, crowds and long matrices, pass or fail: about an hour; ONLY=fuzz runs one
	@$(PY) -m tests.stress $(call given,ONLY) $(ARGS)

check: | setup ## lint, format and types
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

bench: | setup ## training speed on this machine
	@$(PY) -m bench.train $(TRAIN_ARGS)

bench-serve: | setup ## serving speed on this machine: make bench-serve ARGS="..."
	@$(PY) -m bench.serve $(ARGS)

build: ## build the image
	docker build --tag $(IMAGE) .

# GPUs talk through /dev/shm, of which docker itself gives 64 MB. A missing runs/ docker would make as root.
shell: ## a shell in the image, with the GPUs of the box and the runs of this folder
	@mkdir -p runs
	docker run --rm -it --ipc=host $(if $(shell command -v nvidia-smi),--gpus all) --env HUGGINGFACE_TOKEN \
	  --volume "$(CURDIR)/runs:/home/afinar/app/runs" $(IMAGE) bash
