# make demo   the whole pipeline, from demonstrations to an evaluated policy, in outputs/demo/
# make test   lint, types and tests
# Both set up everything they need in .venv.

PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: demo demo-full test lint install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt scripts/install.sh
	scripts/install.sh dev,metaworld,peft
	@touch $@

demo: $(INSTALLED)
	.venv/bin/hlrp-demo --output_dir=outputs/demo

demo-full: $(INSTALLED)
	.venv/bin/hlrp-demo --preset=full --output_dir=outputs/demo_full

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

test: lint
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile

clean:
	rm -rf .venv .uv build *.egg-info
