# `make demo` and `make test` need nothing but Python 3.10-3.13: each sets up .venv first, once, and again
# when setup.py or constraints.txt has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Nothing is downloaded at run time: the demo's model comes with the repository.
export HF_HUB_OFFLINE := 1

.PHONY: help demo demo-edit serve test fuzz soak test-versions machine lint page static engines bench-cpu bench-serving bench-page bench-cluster screenshots bench-export bench-gpu rehearse-gpu wheels quality ablation clean

help:
	@echo "make demo   write out/demo.png and out/demo-sheet.png with the embedded model"
	@echo "make demo-edit  draw into a photograph, whose outside stays as it is: out/edit.png and out/edit-sheet.png"
	@echo "make serve  draw for clients on http://127.0.0.1:8000 with the embedded model"
	@echo "make test   run the tests, a worker on each core, then those that need a cluster, alone"
	@echo "make fuzz   give 20,000 made-up files and arguments to whatever reads strangers' (15 minutes)"
	@echo "make soak   a server under 64 rough clients, killed, and sent nonsense (25 minutes)"
	@echo "make test-versions  run them with the oldest and the newest versions that setup.py allows (an hour, 15 GB of disk)"
	@echo "make machine  print what this machine is and which versions are installed"
	@echo "make lint   check style, formatting, and that the oldest Python knows all that is used; where node is installed, the page's types and logic too"
	@echo "make page   check the page's types and logic (needs node and npm, and the network once)"
	@echo "make static     compile every kernel for six GPU architectures and write what their code is like"
	@echo "make engines    compile the embedded model for this CPU: OpenVINO and ONNX Runtime, in out/"
	@echo "make bench-cpu  time a picture on every backend this CPU has, beside diffusers; what faster settings cost; where a step's time goes (30 minutes, 20 GiB of memory)"
	@echo "make bench-serving  many clients at once: shared steps, one by one, and batches of alike (45 minutes)"
	@echo "make bench-page  the server's page in Chromium: from a stroke to its picture, and memory over ten minutes (20 minutes)"
	@echo "make bench-cluster  what Ray costs a request, and a cluster of up to 1,000 replicas, simulated (5 minutes)"
	@echo "make screenshots  take the pictures of the page that the documentation shows"
	@echo "make bench-export  compile a full-size SDXL of random weights for TensorRT for RTX (20 GiB of memory)"
	@echo "make quality    measure how local the embedded model's control is (5 minutes)"
	@echo "make ablation   train and measure every variant of the method, three seeds each (1.5 hours; can be stopped)"
	@echo "make bench-gpu  test and time the kernels, a full-size picture and a training step on this machine's GPU"
	@echo "make rehearse-gpu  compile every kernel, and try every stage of bench-gpu on this CPU with a small model, in an environment like that of a rented GPU (5 GB of disk)"
	@echo "make wheels     fetch what a bare GPU image lacks, to carry there"
	@echo "make clean  remove .venv, out/ and caches"

demo: $(INSTALLED)
	@mkdir -p out
	$(BIN)/python -m runtime.generate --prompt "a red star and a blue square on sand" \
		--condition examples/sketch.png --preprocess sketch --mask examples/mask-left.png \
		--seed 7 --out out/demo.png --sheet out/demo-sheet.png

demo-edit: $(INSTALLED)
	@mkdir -p out
	$(BIN)/python -m runtime.generate --prompt "stone" --image examples/photo.jpg --height 128 --width 128 \
		--outside held --mask examples/mask-circle.png --region-prompt "a blue circle on stone" \
		--condition examples/sketch.png --preprocess sketch \
		--seed 3 --out out/edit.png --sheet out/edit-sheet.png

serve: $(INSTALLED)
	$(BIN)/python -m runtime.serve

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not gpu and not ray" -n auto --durations 10
	$(BIN)/python -m pytest -m ray --durations 5 $$(grep -rl --include='*.py' 'pytest.mark.ray$$' tests)

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --count 20000

soak: $(INSTALLED)
	$(BIN)/python -m tests.soak --minutes 10 --kills 20 --bodies 10000

test-versions:
	$(PYTHON) tests/versions.py

machine: $(INSTALLED)
	$(BIN)/python -m benchmarks.machine

PACKAGES := benchmarks export kernels runtime tests training

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vermin --quiet --no-tips --target=3.10- --eval-annotations --violations setup.py $(PACKAGES)
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory page; \
	else echo "the page's types and logic are not checked: node and npm are missing"; fi

# What the server's page is written in has types in its comments; TypeScript, which checks them, is for developers alone.
page: tests/page/node_modules/.installed
	cd tests/page && npx tsc --project tsconfig.json && node --test

tests/page/node_modules/.installed: tests/page/package.json
	cd tests/page && npm install --no-package-lock --no-audit --no-fund
	@touch $@

# Neither static analysis nor its compiler needs a GPU.
static: $(INSTALLED)
	$(BIN)/python -m benchmarks.static

ENGINES := out/engines-openvino-fp32 out/engines-openvino-bf16 out/engines-onnxruntime-fp32

engines: $(ENGINES)

out/engines-%: $(INSTALLED)
	$(BIN)/python -m export.build_engine --target $(word 1,$(subst -, ,$*)) --precision $(word 2,$(subst -, ,$*)) \
		--batch 1:1:8 --height 64:128:256 --width 64:128:256 --out $@ --overwrite

bench-cpu: $(ENGINES)
	$(BIN)/python -m benchmarks.latency --engine $(ENGINES) --batch 1 8 --compile
	$(BIN)/python -m benchmarks.lossy --engine $(ENGINES)
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.roofline --full-size
	$(BIN)/python -m benchmarks.full_size --repeats 8
	$(BIN)/python -m benchmarks.memory

bench-serving: $(INSTALLED)
	$(BIN)/python -m benchmarks.serving

bench-cluster: $(INSTALLED)
	$(BIN)/python -m benchmarks.cluster
	$(BIN)/python -m benchmarks.cluster.simulation

bench-page: $(INSTALLED) out/engines-openvino-fp32
	$(BIN)/python -m tests.soak.page --engine out/engines-openvino-fp32 --minutes 10

screenshots: $(INSTALLED)
	$(BIN)/python -m tests.soak.screenshots

bench-export: $(INSTALLED)
	$(BIN)/python -m benchmarks.export
	$(BIN)/python -m benchmarks.graphs

quality: $(INSTALLED)
	$(BIN)/python -m benchmarks.quality --count 70 --curves

ablation: out/engines-openvino-fp32
	$(BIN)/python -m benchmarks.quality.ablation --engine $<

# In the environment at hand, which has a CUDA build of torch. Weights are random: latency does not depend on them.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu

# With a GPU image's versions, and without the packages that it lacks. Every kernel is compiled first: what only a
# compiler refuses fails here, not on the GPU.
IMAGE := out/gpu-image
IMAGE_PYTHON ?= python3.12
rehearse-gpu: $(IMAGE)/.installed
	$(IMAGE)/bin/python -m benchmarks.static --quick --arch 90 --out out/rehearsal/static.csv
	$(IMAGE)/bin/python -m benchmarks.gpu --small --budget 1800 --out out/rehearsal

$(IMAGE)/.installed: benchmarks/gpu/image.txt
	@echo "Setting up $(IMAGE) (once; 3 GB are downloaded, 5 GB kept) ..."
	@command -v $(IMAGE_PYTHON) >/dev/null || { echo "Python 3.12 is needed: try make $@ IMAGE_PYTHON=..." >&2; exit 1; }
	$(IMAGE_PYTHON) -m venv --clear $(IMAGE)
	$(MAKE) wheels PYTHON=$(IMAGE)/bin/python
	$(IMAGE)/bin/python -m pip install --disable-pip-version-check -r $<
	$(IMAGE)/bin/python -m pip install --disable-pip-version-check --no-deps wheels/*.whl
	@touch $@

# What such an image lacks (one with torch, triton, transformers and peft): pip install --no-deps wheels/*.whl
WHEELS := diffusers kornia kornia-rs importlib-metadata
wheels:
	$(PYTHON) -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -c constraints.txt -d wheels $(WHEELS)

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis tests/page/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv writes: a folder without it is a broken start, to be completed.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; a minute or several: PyTorch is large) ..."
	@test -x $(BIN)/pip || { \
		$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit( \
			"Python 3.10 to 3.13 is needed, $(PYTHON) is %d.%d: try make PYTHON=python3.12" % v)' \
		&& $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@
