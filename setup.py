"""Packaging. `make test` installs from here with `pip install -c constraints.txt -e ".[dev]"`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
PACKAGES = ("runtime", "kernels", "export", "training")
# Read, not imported: where this builds, `import kernels` may find another package of that name.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "kernels/__init__.py").read_text("utf-8"), re.M)[1]

REQUIREMENTS = [
    "torch>=2.11,<2.15",
    'triton>=3.6; sys_platform == "linux" and platform_machine == "x86_64"',
    "accelerate>=1.15",
    "diffusers>=0.41",
    "huggingface_hub>=1.32",
    "numpy>=2.2",
    "opencv-python-headless>=4.10",
    "peft>=0.21",
    "pillow>=12",
    "safetensors>=0.8",
    "tqdm>=4.67",
    "transformers>=5.17",
]

EXTRAS = {
    "train": ["braceexpand>=0.1.7", "datasets>=4", "pyarrow>=21", "tensorboard>=2.19", "tokenizers>=0.23"],
    "export": ["onnx>=1.19", "onnx-ir>=1.1", "onnxruntime>=1.23", "onnxscript>=0.7", "psutil>=7"],
    "tensorrt": ["tensorrt>=10.14"],
    "tensorrt-rtx": ["tensorrt-rtx>=1.5"],
    "xformers": ["xformers>=0.0.35"],
    "bitsandbytes": ["bitsandbytes>=0.45"],  # training.train_adapter --optimizer adamw8bit
    "openvino": ["openvino>=2025.4"],
    "serve": [
        "anyio>=4.5",
        "fastapi>=0.120",
        "prometheus-client>=0.22",
        "pydantic>=2.11",
        "python-multipart>=0.0.20",
        "starlette>=0.46",
        "uvicorn>=0.34",
    ],
    "batch": ["anyio>=4.5", "pyarrow>=21", "pydantic>=2.11"],
    "ray": ["ray[data,serve]>=2.60"],  # beside serve, or batch
    "quality": ["matplotlib>=3.10", "scikit-image>=0.25", "torchmetrics>=1.8"],
    "dev": [
        "anyio>=4.5",
        "axe-playwright-python>=0.1.4",
        "braceexpand>=0.1.7",
        "datasets>=4",
        "fastapi>=0.120",
        "hypothesis>=6.150",
        "kornia>=0.8.2",
        "matplotlib>=3.10",
        "onnx>=1.19",
        "onnx-ir>=1.1",
        "onnxruntime>=1.23",
        "onnxscript>=0.7",
        "openai>=2",
        "openvino>=2025.4",
        "packaging",
        "playwright>=1.50",
        "prometheus-client>=0.22",
        "psutil>=7",
        "pyarrow>=21",
        "pydantic>=2.11",
        "pytest>=9",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        "python-multipart>=0.0.20",
        "ray[data,serve]>=2.60",
        "ruff>=0.17",
        "schemathesis>=4",
        "scikit-image>=0.25",
        "starlette>=0.46",
        "tensorboard>=2.19",
        'tensorrt-rtx>=1.5; sys_platform == "linux" and platform_machine == "x86_64"',  # builds without a GPU
        "torchmetrics>=1.8",
        "setuptools>=77",  # tests/test_packaging.py builds the wheel without the network
        "uvicorn>=0.34",
        "vermin>=1.6",
    ],
}

setup(
    name="localcontrol",
    version=VERSION,
    description="SDXL text-to-image with control that acts only inside a painted region",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    # `benchmarks` and `tests` run from a clone, where their results are committed; as top-level packages of
    # these names they would only get in the way of others in site-packages.
    packages=find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
    package_data={"runtime": ["configs/**/*", "embedded/**/*", "serve/page/**/*"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
