# The commands a newcomer needs. Every target does its own set-up first (scripts/install: .venv with the pinned set).
#   make demo            train the embedded Countdown model, live, then serve until Ctrl-C
#   make demo ARGS="--exit --json demo.json"
#   make test            check, then every test this machine can run
#   make test-triton     the CUDA kernel under Triton's interpreter, without a GPU; installs Triton (1 GB)
#   make check           format, lint, types, layering
#   make format          apply the formatter and the safe lint fixes
#   make bench           the short set of benchmarks (the machine should have nothing else to do); JSON in build/bench

BIN := .venv/bin
# Two spinning OpenMP threads on a busy machine are many times slower than two that sleep while they wait.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-triton check format bench install clean

install:
	@scripts/install

demo: install
	@$(BIN)/rewardsmith demo $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layering.py tests/test_exported_names.py

test: check
	$(BIN)/pytest $(ARGS)

# Not in constraints.txt: torch's CUDA build brings a version of its own.
TRITON := triton==3.9.0

test-triton: install
	@$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check $(TRITON)
	$(BIN)/pytest tests/rollout/test_triton_kernels.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

BENCHMARKS := roofline vs_trl rollout update time_to_reward scaling

bench: install
	@mkdir -p build/bench
	@for name in $(BENCHMARKS); do \
		echo "== $$name"; \
		$(BIN)/python bench/$$name.py --short --json build/bench/$$name.json || exit 1; \
	done

clean:
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache
