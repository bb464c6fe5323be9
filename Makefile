# Everything is set up on the way: make demo and make test work in a fresh clone, Python 3.10 to 3.13.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS := 1

.PHONY: demo test lint format bench fuzz clean

demo: .venv/ready  ## the method and its baseline on drawn scenes, side by side: about three and a half minutes on two cores
	mkdir -p runs
	$(BIN)/python gta_seg.py --dataset shapes --method suponly --resume --out runs/demo-suponly \
		> runs/demo-suponly.txt 2>&1 & baseline=$$!; \
	$(BIN)/python gta_seg.py --dataset shapes --resume --out runs/demo-gta; method=$$?; \
	wait $$baseline || { tail runs/demo-suponly.txt; exit 1; }; exit $$method
	$(BIN)/python docs/compare.py runs/demo-suponly runs/demo-gta --strip runs/demo.png

test: lint  ## all tests on all cores; ARGS="-k words -x" chooses among them
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: .venv/tests
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: .venv/tests
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: .venv/tests  ## step cost, loader, EMA, metrics: ratios measured in one run
	for f in tests/bench_*.py; do $(BIN)/python -m tests.$$(basename $$f .py) || exit 1; done

fuzz: .venv/tests  ## properties of what parses outside data, on new inputs for FUZZ_MINUTES (60)
	$(BIN)/python -m tests.fuzz

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/tests: .venv/ready tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
