"""Packages, dependencies with their lower bounds, and extras."""
import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / 'rlsearch' / '__init__.py').read_text('utf-8'), re.M).group(1)

# The fast tests passed with all of these at their lower bounds at once (experiments/LOG.md); extras were not tried so.
REQUIRES = [
    'absl-py>=2.3.1',
    'bm25s>=0.3.0',
    'chex>=0.1.91',
    'etils[epath]>=1.14.0',
    'flax>=0.12.0',
    'jax>=0.10.0',
    'matplotlib>=3.10.0',
    'ml-collections>=1.1.0',
    'numpy>=2.0.0',
    'optax>=0.2.6',
    'orbax-checkpoint>=0.12.0',
    'scipy>=1.15.0',
    'sentencepiece>=0.2.1',
    'tensorboardX>=2.6.4',
    'tensorstore>=0.1.84',
    'tokenizers>=0.22.0',
    'tqdm>=4.67.0',
]
EXTRAS = {
    'tpu': ['jax[tpu]>=0.10.0', 'etils[epath-gcs]>=1.14.0'],
    'gpu': ['jax[cuda12]>=0.10.0'],
    'gcs': ['etils[epath-gcs]>=1.14.0'],
    'hf': ['jinja2>=3.1.6'],
    'parquet': ['pyarrow>=18.0.0'],
    'dev': ['fsspec>=2024.6.0', 'pytest>=8.3.0', 'pytest-xdist>=3.6.0', 'jinja2>=3.1.6', 'pyarrow>=18.0.0', 'nbformat>=5.10.0', 'nbclient>=0.10.0',
            'ipykernel>=6.29.0', 'packaging>=24.0', 'pyyaml>=6.0', 'safetensors>=0.5.0', 'setuptools>=65.0.0'],
    # The second tier of tests: parity with transformers and PEFT, programs compiled for TPUs.
    'slow': ['jax[tpu]>=0.10.0', 'peft>=0.17.0', 'torch>=2.8.0', 'transformers>=5.0.0'],
}

setup(
    name='rlsearch',
    version=VERSION,
    description='Reinforcement learning for language models that search.',
    long_description=(HERE / 'README.md').read_text('utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    # The configs come along, so that an installed rlsearch has its methods outside a checkout too.
    packages=find_packages(include=['rlsearch', 'rlsearch.*', 'configs']),
    package_data={'configs': ['README.md']},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
