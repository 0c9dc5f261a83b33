PYTHON ?= python3
VENV ?= .venv
RUN ?= demo
INSTALLED = $(VENV)/.installed
CONSTRAINTS ?=
CHANGE ?= as it is
# a file to a process, and a thread to each: threads that wait for each other make a busy machine many times slower
PYTEST = CLIPGEN_PROGRESS=0 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
PARALLEL = -n auto --maxprocesses 4 --dist loadfile
NBVAL = --nbval-sanitize-with tests/nbval.cfg --nbval-cell-timeout 900

.PHONY: install demo test test-oldest notebooks bench chaos stability gap speedrun

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(CONSTRAINTS) --editable ".[notebooks,photos,test]"
	touch $@

# Notebooks 01 to 04 on the Shapes world; an interrupted demo resumes from its last checkpoint.
demo: $(INSTALLED)
	$(VENV)/bin/clipgen run --preset laptop --run $(RUN)

# The tests, and the notebooks beside them, both to the end; fails if either failed.
test: $(INSTALLED)
	rm -rf results/smoke results/smoke-clip  # notebooks run from the beginning
	failed=0; log=$$(mktemp); \
	$(PYTEST) -p no:cacheprovider --nbval notebooks $(NBVAL) > $$log 2>&1 & notebooks=$$!; \
	$(PYTEST) $(PARALLEL) tests || failed=1; \
	wait $$notebooks || failed=1; cat $$log; rm $$log; exit $$failed

# The same with the oldest versions that pyproject.toml allows, in an environment of their own.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS="--constraint tests/oldest.txt"

# Run the saved notebooks again, at preset smoke, and keep their outputs.
notebooks: $(INSTALLED)
	rm -rf results/smoke results/smoke-clip
	CLIPGEN_PROGRESS=0 $(VENV)/bin/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb
	$(VENV)/bin/python -c "import nbformat, pathlib, clipgen_lib.cli as c; [nbformat.write(c.tidied(nbformat.read(p, 4)), p) for p in pathlib.Path('notebooks').glob('*.ipynb')]"

# Speed beside the plain ways, into results/speed/cpu.json.
bench: $(INSTALLED)
	$(VENV)/bin/pip install --quiet --editable ".[bench]"
	$(VENV)/bin/python tests/speed.py

# Faults injected into runs, into results/chaos/table.json.
chaos: $(INSTALLED)
	$(VENV)/bin/python tests/chaos.py

# Which distance orders generators the same way at a small N, into results/stability.
stability: $(INSTALLED)
	$(VENV)/bin/python tests/stability.py

# What the gap between texts and images costs the generator `shapes`, into results/gap.
gap: $(INSTALLED)
	$(VENV)/bin/python tests/gap.py

# Seconds from nothing to a generator that does what it is told, three seeds, as a row of results/speedrun/table.json.
speedrun: $(INSTALLED)
	$(VENV)/bin/python tests/speedrun.py --change "$(CHANGE)"
