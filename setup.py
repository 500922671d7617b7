"""Installs megatron_vila: ``pip install -c constraints.txt -e .[test]`` (Python 3.12 and later: ``constraints-py312.txt``).

Lower bounds are the oldest versions that were tried; the constraints files hold the versions that the tests run with.
"""

from setuptools import find_packages, setup

REQUIRED = [
    "torch>=2.11",
    "megatron-core>=0.16.1",
    # megatron-core 0.19 imports triton without declaring it; a CPU build of torch does not bring it along
    "triton; python_version >= '3.12' and sys_platform == 'linux'",
    # megatron-core asks for einops when it makes hierarchical context-parallel groups
    "einops>=0.8",
    "transformers>=5.23",
    "tokenizers>=0.22",
    "safetensors>=0.8",
    "sentencepiece>=0.2",
    "jinja2>=3.1",
    "markupsafe>=3",
    "av>=18",
    "pillow>=11.3",
    "numpy>=2",
    "omegaconf>=2.3",
    "pyyaml>=6",
    "tensorboard>=2.18",
    "rich>=13.9",
    "matplotlib>=3.9",
    "xxhash>=3.4",
]

setup(
    name="megatron-vila",
    version="0.1.0",
    description="Training of long-video vision language models with multi-modal sequence parallelism on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_vila", "megatron_vila.*"]),
    package_data={"megatron_vila": ["py.typed", "config/presets/**/*.yaml", "explain/view/page.*"]},
    install_requires=REQUIRED,
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "fsspec[http]>=2025.3",
            # pages in a real browser, where chromium is installed
            "selenium>=4.30",
            # of .ci/check
            "ruff>=0.9",
            "import-linter>=2.17",
            "mypy>=2.4",
            "types-pyyaml>=6",
            # Trainers under MM-SP (hf/mm_sp/trainer.py)
            "accelerate>=1.15",
            "peft>=0.21",
            "trl>=1.16",
            # other readers of the shards that are prepared
            "megatron-energon>=7.4.1",
            "pyarrow>=20",
            # transformers' own tests
            "parameterized>=0.9",
        ],
        # tools/prepare_data.py: the index of the shards, parquet files
        "prepare": ["megatron-energon>=7.4.1", "pyarrow>=20"],
        # tools/prepare_data.py --ray
        "ray": ["megatron-energon>=7.4.1", "pyarrow>=20", "ray[data]>=2.50"],
        # pre-release: pinned here, because pip takes one only when asked for it by its exact version; the constraints files pin
        # what it brings
        "gpu": ["flash-attn-4[cu13]==4.0.0b36", "quack-kernels>=0.6.5"],
        # shards behind an address; what reads s3:// (s3fs), gs:// (gcsfs) and others is installed beside it
        "remote": ["fsspec[http]>=2025.3"],
        "te": ["transformer-engine[pytorch]>=2.13"],
    },
)
