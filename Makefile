# make setup: .venv with all that the tests and the quickstart need. make quickstart, make test:
# that, then the main job on real data, or the tests. Each can be repeated.
PYTHON ?= python3
BIN := .venv/bin
QUICK := runs/quickstart
RUN := $(QUICK)/run
CONFIG ?= configs/quickstart.py
# Windows evaluated, evenly spread: by S-DPO and the floor, by base and SFT (every third one of them),
# and over the whole catalogue (every fourth).
LIMIT ?= --limit=505
THIRD ?= --limit=169
QUARTER ?= --limit=127
OTHERS ?=

.PHONY: setup quickstart demo long bench parity chat stress aot gpu docs types test test-network test-browser load clean

setup: .venv/ready

.venv/ready: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than Python 3.11: run make PYTHON=python3.11 …" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[quickstart,test,trackers,browser,docs]'
	$(BIN)/python -m sdpo_jax.system.wheels
	@touch $@

quickstart: setup
	$(BIN)/python -m sdpo_jax.prepare --dataset=movielens --output=$(QUICK)/data
	$(BIN)/python -m sdpo_jax.convert --output=$(QUICK)/model
	$(BIN)/python -m sdpo_jax.train --config=$(CONFIG) --workdir=$(RUN)
	$(BIN)/python -m sdpo_jax.baselines --model=random --dataset=$(QUICK)/data --workdir=$(RUN) \
	  --split=test_all $(LIMIT)
	$(BIN)/python -m sdpo_jax.baselines --model=popularity --dataset=$(QUICK)/data \
	  --workdir=$(RUN) --split=test_all $(LIMIT)
	$(BIN)/python -m sdpo_jax.evaluate --workdir=$(RUN) --stage=base,sft --decoder=score \
	  --split=test_all $(THIRD)
	$(BIN)/python -m sdpo_jax.evaluate --workdir=$(RUN) --stage=sdpo --decoder=score \
	  --split=test_all $(LIMIT)
	$(BIN)/python -m sdpo_jax.evaluate --workdir=$(RUN) --stage=sdpo --rank=catalogue \
	  --decoder=beam --split=test_all $(QUARTER)
	$(BIN)/python -m sdpo_jax.report --workdir=$(RUN)

# A page with recommendations, without training: two minutes.
demo: setup
	$(BIN)/python -m sdpo_jax.demo

# Two epochs of SFT and all windows of test_all, with SASRec beside: a run of its own. Hours. Base and
# SFT have every third window, the catalogue every fifteenth.
long:
	$(MAKE) quickstart CONFIG=configs/quickstart.py:long RUN=$(QUICK)/long LIMIT= \
	  THIRD=--limit=2555 QUARTER=--limit=511
	$(BIN)/python -m sdpo_jax.baselines --model=sasrec --dataset=$(QUICK)/data \
	  --workdir=$(QUICK)/long --split=test_all
	$(BIN)/python -m sdpo_jax.report --workdir=$(QUICK)/long

# Beside PyTorch, which therefore has a .venv of its own; a bit over an hour on two cores.
bench: .venv-bench/ready
	.venv-bench/bin/python -m sdpo_jax.prepare --dataset=movielens --output=$(QUICK)/data
	.venv-bench/bin/python -m sdpo_jax.convert --output=$(QUICK)/model
	.venv-bench/bin/python -m benchmarks --model=$(QUICK)/model --dataset=$(QUICK)/data \
	  --others=$(OTHERS)

# Steps and decoders compiled for TPUs and GPUs that are not here; within an hour on two cores. The
# compilers take 6 GB in a .venv of their own.
aot: .venv-aot/ready
	.venv-aot/bin/python -m benchmarks.aot --output=benchmarks/results/aot.json

.venv-aot/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/pip install --quiet --disable-pip-version-check -e '.[gpu,tpu,test]'
	@touch $@

# All that only an accelerator shows, in nine minutes, on the machine that has one: with its own JAX.
# OUT: folder of the results; MODEL: a converted model or a .gguf file.
OUT ?= runs/gpu
MODEL ?= $(QUICK)/model
gpu:
	$(PYTHON) -m benchmarks.gpu --output=$(OUT) --model=$(MODEL) --dataset=$(QUICK)/data

# Every family against transformers and PEFT, every baseline against a twin in PyTorch, and their
# tables; what the tests have as golden files.
parity: .venv-bench/ready
	HF_HUB_DISABLE_PROGRESS_BARS=1 .venv-bench/bin/python -m pytest -W ignore -s tests/parity.py \
	  tests/parity_baselines.py

.venv-bench/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -e '.[quickstart,bench,parity]'
	@touch $@

# ChatRec against a real server, llama.cpp's, which is compiled first: a quarter of an hour, and
# needs cmake and a C++ compiler.
chat: setup .venv-chat/ready
	$(BIN)/python -m sdpo_jax.prepare --dataset=movielens --output=$(QUICK)/data
	tests/chat_server.sh $(QUICK)/data runs/chat --limit=20

.venv-chat/ready:
	$(PYTHON) -m venv .venv-chat
	.venv-chat/bin/pip install --quiet --disable-pip-version-check 'llama-cpp-python[server]>=0.3.16,<0.4'
	@touch $@

# A tiny training killed 200 times at random moments; half an hour on two cores.
stress: setup
	PYTHONPATH=. $(BIN)/python tests/stress.py --kills=200

# README, docs/ and the source as a site: site/html. A warning, such as a broken link, is an error.
docs: setup
	$(BIN)/python docs/site.py

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

# Two network namespaces whose cable is cut, and Slurm's own sbatch where it is installed: needs root.
test-network: setup
	$(BIN)/python -m pytest tests/network.py

# The page of `sdpo serve` in Chromium, where it is installed.
test-browser: setup
	$(BIN)/python -m pytest tests/browser.py

# Ten minutes of wrong, huge, slow and broken requests among good ones.
load: setup
	PYTHONPATH=.:tests $(BIN)/python tests/load.py --minutes=10

clean:
	rm -rf runs site .venv .venv-aot .venv-bench .venv-chat
