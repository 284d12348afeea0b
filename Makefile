# `make quickstart`: train small on phantoms and write a report for a held-out scan. `make test`: run the tests.
# `make docs`: the docstrings as pages, in build/docs.
# All make their own .venv; nothing is needed but Python (3.10 or newer) and make.

PYTHON ?= python3
OUTPUT ?= outputs/quickstart
THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
CONFIGS ?= train/configs/quickstart
# Smaller numbers give a faster and worse run. Spacing in mm along x, y, z.
TRAIN_STUDIES ?= 4500
SPACING ?= 5 5 8

BIN := $(CURDIR)/.venv/bin
# Without `--num_cpu_threads_per_process`, accelerate gives a CPU process one thread.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_cpu_threads_per_process $(THREADS)

DATA := --dataset $(OUTPUT)/phantoms --cache_dir $(OUTPUT)/cache

.PHONY: quickstart test docs clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

test: .venv/installed
	$(BIN)/python -m pytest

docs: .venv/installed
	$(BIN)/python docs/render.py build/docs

quickstart: .venv/installed
	@date "+%T install finished, quickstart starts"
	$(BIN)/python datasets_scripts/build_phantom.py --output $(OUTPUT)/phantoms \
	  --train-studies $(TRAIN_STUDIES) --validation-studies 100 --test-studies 200 --workers $(THREADS) \
	  --spacing $(SPACING)
	$(BIN)/python datasets_scripts/fetch_demo_ct.py --output $(OUTPUT)/demo_ct
	$(LAUNCH) train/foundation.py --config $(CONFIGS)/foundation.yaml $(DATA) --output_dir $(OUTPUT)/foundation
	$(LAUNCH) train/stage1.py --config $(CONFIGS)/stage1.yaml $(DATA) --output_dir $(OUTPUT)/stage1 \
	  --text_encoder $(OUTPUT)/foundation/text_encoder
	$(LAUNCH) train/stage2.py --config $(CONFIGS)/stage2.yaml $(DATA) --output_dir $(OUTPUT)/stage2 \
	  --stage1 $(OUTPUT)/stage1 --slice_encoder $(OUTPUT)/foundation/slice_encoder
	$(LAUNCH) train/stage3.py --config $(CONFIGS)/stage3.yaml $(DATA) --output_dir $(OUTPUT)/stage3 \
	  --stage1 $(OUTPUT)/stage1 --stage2 $(OUTPUT)/stage2 --language_model $(OUTPUT)/foundation/language_model
	$(BIN)/python train/evaluate.py --config $(CONFIGS)/evaluate.yaml $(DATA) --output_dir $(OUTPUT)/evaluation \
	  --stage1 $(OUTPUT)/stage1 --stage2 $(OUTPUT)/stage2 --model $(OUTPUT)/stage3
	@echo "A fresh process, outside the repository, without the Hub: a held-out phantom, then a real chest CT."
	@echo "(The real scan only shows that real files go through: a model trained on phantoms knows no real disease.)"
	mkdir -p $(OUTPUT)/elsewhere
	cd $(OUTPUT)/elsewhere && HF_HUB_OFFLINE=1 HF_HOME=$$PWD/hf_home $(BIN)/python $(CURDIR)/examples/report_scan.py \
	  --model $(abspath $(OUTPUT))/stage3 --phantoms $(abspath $(OUTPUT))/phantoms --figure $(abspath $(OUTPUT))/phantom.png
	cd $(OUTPUT)/elsewhere && HF_HUB_OFFLINE=1 HF_HOME=$$PWD/hf_home $(BIN)/python $(CURDIR)/examples/report_scan.py \
	  --model $(abspath $(OUTPUT))/stage3 --scan $(abspath $(OUTPUT))/demo_ct/chest_ct.nii.gz --figure $(abspath $(OUTPUT))/real.png
	@echo "The same scan by the command line, in text and, with its manifest kept, in JSON."
	$(BIN)/hsenet report $(OUTPUT)/stage3 $(OUTPUT)/demo_ct/chest_ct.nii.gz
	$(BIN)/hsenet report $(OUTPUT)/stage3 $(OUTPUT)/demo_ct/chest_ct.nii.gz --json --output $(OUTPUT)/reports
	@date "+%T quickstart finished"

clean:
	rm -rf .venv outputs
