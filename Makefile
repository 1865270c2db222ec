# make demo [SEED=0] [METHOD=search_r1_grpo] [WORKDIR=runs/demo]
# Everything needs Python 3.11 or later and nothing else; PYTHON=... names one that is not found by itself.
SEED    = 0
METHOD  = search_r1_grpo
WORKDIR = runs/demo
PYTHON  =

WORKERS = 2
# One release of torch, of which a build for CPUs alone can be put where pip looks; another: make test-slow TORCH=...
TORCH   = torch==2.13.0

RUN   = .venv/bin/python
STAMP = .venv/.installed
SLOW  = .venv/.slow

.PHONY: demo test test-slow clean

# The same command continues a run that was stopped; a run of other settings in WORKDIR is deleted.
demo: $(STAMP)
	$(RUN) -m rlsearch.train --config=configs/$(METHOD).py --config.seed=$(SEED) --workdir=$(WORKDIR) --overwrite
	@printf 'report: '; $(RUN) -m rlsearch.report --workdir=$(WORKDIR)

test: $(STAMP)
	$(RUN) -m pytest -m 'not slow' -n $(WORKERS) --dist loadfile

# The second tier is not spread: it trains, kills processes and compiles for TPUs, and wants the cores.
test-slow: $(STAMP) $(SLOW)
	$(RUN) -m pytest -m slow

# Runs stay.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache
	find rlsearch configs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(SLOW): $(STAMP)
	$(RUN) -m pip install --quiet --disable-pip-version-check '$(TORCH)' --editable '.[dev,slow]'
	touch $@

$(STAMP): setup.py pyproject.toml
	@begun=$$(date +%s); found=; \
	for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: no Python 3.11 or later ($(or $(PYTHON),tried python3.11 to python3.13, python3, python));" \
	    "install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	echo "setting up .venv with $$("$$found" --version)"; \
	"$$found" -m venv .venv && $(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' || exit 1; \
	touch $@; \
	echo "installed in $$(($$(date +%s) - begun)) s; .venv has $$(du -sh .venv | cut -f1)"
