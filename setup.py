"""Package metadata of megarat. The pins that tests run with are in requirements.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="megarat",
    version="0.1.0",
    description="Distributed training of RAT+ language models: train dense, infer sparse",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megarat", "megarat.*", "data_tools"]),
    package_data={"megarat": ["py.typed"], "megarat.demo": ["*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "deepspeed>=0.19.4",
        "numpy",
        "pyyaml",
        "tqdm",
        "tensorboard",
        "webdataset>=1.0.2",
        "sentencepiece",
        "tokenizers",
        "matplotlib",
    ],
    extras_require={
        "data": ["pyarrow", "zstandard", "mpi4py"],
        "eval": ["lm-eval>=0.4.9"],
        "export": ["transformers>=4.57"],
        "test": ["pytest", "ruff", "mypy", "types-PyYAML", "mpich", "transformers"],
    },
    entry_points={"console_scripts": ["megarat = megarat.cli:main"]},
)
