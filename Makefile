# Every command a developer needs; `make` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that a broken-off installation is taken up again.
STAMP := $(VENV)/.installed

.PHONY: help setup quickstart test test-slow lint format docs lock bench-trl bench-push bench-stall bench-hosts bench-placement bench-start bench-swap bench-lora bench-sandbox bench-episodes bench-store bench-partial bench-staleness bench-ranks bench-optim bench-cuda bench-muonclip bench-math bench-critic bench-router bench-logprobs bench-train bench-claims clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Build .venv from the lock, if the lock or pyproject.toml changed

$(STAMP): requirements/cpu.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null \
		|| { echo "error: $(PYTHON) not found: install Python 3.11, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing $$(grep -c == requirements/cpu.lock) packages into $(VENV) (2.7 GB, some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --no-deps -r requirements/cpu.lock \
		|| { echo "error: installation failed; if it is torch's +cpu build that pip cannot find," \
		"set PIP_EXTRA_INDEX_URL to PyTorch's CPU package index"; exit 1; }
	@$(BIN)/pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

quickstart: setup ## Train SmolLM2-135M to use a calculator, on this machine's CPU
	$(BIN)/k2rl train experiment=quickstart $(ARGS)

test: setup ## Unit and integration tests (some of them: make test ARGS="-m 'not integration'")
	$(BIN)/pytest -n 4 --dist loadgroup $(ARGS)

test-slow: setup ## The tests marked slow: soaks and long attacks
	$(BIN)/pytest -n 2 --dist loadgroup --slow $(ARGS)

lint: setup ## Lint, format check, types, the direction of imports, and that docs/config.md is current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/config_reference.py --check

format: setup ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## Regenerate docs/config.md from the configuration's comments
	$(BIN)/python docs/config_reference.py

lock: ## Resolve the dependencies anew and rewrite requirements/cpu.lock
	requirements/make_lock.sh

bench-trl: setup ## Samples per second beside TRL's GRPO, taking turns on this machine
	$(BIN)/python benchmarks/trl_compare.py $(ARGS)

bench-push: setup ## Bytes per second of a push on one host, beside plain memory copies
	$(BIN)/python benchmarks/weight_push.py $(ARGS)

bench-stall: setup ## How long a live vLLM stands still for new weights, beside restarting it
	$(BIN)/python benchmarks/weight_stall.py $(ARGS)

bench-hosts: setup ## Bytes per second between hosts (network namespaces; as root), beside gloo's broadcast
	$(BIN)/python benchmarks/weight_hosts.py $(ARGS)

bench-placement: setup ## Placing weights in vLLM: its loaders beside recorded copies
	$(BIN)/python benchmarks/placement.py $(ARGS)

bench-start: setup ## From nothing to vLLM's first token: processes spawned beside forked
	$(BIN)/python benchmarks/start_up.py $(ARGS)

bench-ranks: setup ## Two trainer ranks beside one, and offloaded state beside memory copies
	$(BIN)/python benchmarks/train_ranks.py $(ARGS)

bench-swap: setup ## What trainer and vLLM hold while the other works, and what a switch costs
	$(BIN)/python benchmarks/memory_swap.py $(ARGS)

bench-lora: setup ## Pushes of adapters into a live vLLM beside pushes of all weights
	$(BIN)/python benchmarks/lora_push.py $(ARGS)

bench-optim: setup ## Muon's step beside torch's, and Newton-Schulz beside plain matrix products
	$(BIN)/python benchmarks/optim.py $(ARGS)

bench-cuda: setup ## On a CUDA device: Muon, log-probs and the attention probe beside torch's own
	$(BIN)/python benchmarks/gpu.py $(ARGS)

bench-muonclip: setup ## How attention logits grow under Muon, and under MuonClip
	$(BIN)/python benchmarks/muonclip.py $(ARGS)

bench-sandbox: setup ## Snippets per second in sandboxes, and what a start costs, beside plain python3
	$(BIN)/python benchmarks/sandbox_speed.py $(ARGS)

bench-episodes: setup ## Ten thousand episodes at once: CPU a turn, memory, none lost
	$(BIN)/python benchmarks/many_episodes.py $(ARGS)

bench-store: setup ## Trajectories per second through Redis and SQLite, each exactly once
	$(BIN)/python benchmarks/episode_store.py $(ARGS)

bench-partial: setup ## Partial rollouts beside synchronous batches, on a task with a long tail
	$(BIN)/python benchmarks/partial_rollouts.py $(ARGS)

bench-staleness: setup ## What tokens of older weights cost: partial rollouts beside synchronous steps, equal tokens
	$(BIN)/python benchmarks/staleness.py $(ARGS)

bench-math: setup ## The math judge on 2,000 pairs with hopeless ones among them, from threads
	$(BIN)/python benchmarks/math_judge.py $(ARGS)

bench-critic: setup ## Whether the closed loop teaches the critic: agreement on held-out pairs, trained and frozen
	$(BIN)/python benchmarks/self_critique.py $(ARGS)

bench-router: setup ## How often vLLM and trainer choose other experts, and the log-prob gap that comes of it
	$(BIN)/python benchmarks/router_mismatch.py $(ARGS)

bench-logprobs: setup ## Log-probs over 160k tokens: memory and time beside all logits at once
	$(BIN)/python benchmarks/logprobs.py $(ARGS)

bench-train: setup ## Tokens per second of a train step beside plain transformers with padding
	$(BIN)/python benchmarks/train_throughput.py $(ARGS)

bench-claims: setup ## Claims of the papers on a small scale: budgets, PTX, temperature, objectives
	$(BIN)/python benchmarks/claims.py $(ARGS)

clean: ## Remove caches and build products; runs under outputs/ and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
