"""A method's config with overrides laid over it: `--config=experiments/variant.py:SPEC.json`.

SPEC.json holds {"method": NAME, "scale": SCALE, "overrides": {"a.b": value, ...}}: an ablation is a list of overrides,
never a copied config.  A value that is a mapping replaces what stands there whole.
"""
from __future__ import annotations

from collections.abc import Mapping
import importlib
import json
import pathlib
from typing import Any

from ml_collections import ConfigDict


def lay(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  """Returns the config with entries ('a.b': value) changed.

  Raises:
    ValueError: a path that leads nowhere.
  """
  for path, value in overrides.items():
    *parents, name = path.split('.')
    section = config
    for parent in parents:
      if not isinstance(section, ConfigDict) or parent not in section:
        raise ValueError(f'override {path!r}: {parent!r} is no entry; known: {sorted(section.keys())}')
      section = section[parent]
    if name not in section and section is config:
      raise ValueError(f'override {path!r}: no such entry; known: {sorted(section.keys())}')
    section[name] = ConfigDict(value) if isinstance(value, Mapping) else tuple(value) if isinstance(value, list) else value
  return config


def get_config(spec: str) -> ConfigDict:
  """Returns the config of a spec file."""
  said = json.loads(pathlib.Path(spec).read_text())
  method = importlib.import_module(f'configs.{said["method"]}')
  return lay(method.get_config(said['scale']), said['overrides'])
