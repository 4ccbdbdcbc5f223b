"""Configs of a model, its data and its training: frozen dataclasses, checked when they are made.

Every field has a default; together the defaults are configs/toy.toml. None means off.
"""

from dsmini.config.fields import mask_function, require_subclass
from dsmini.config.model import ModelConfig, layer_config
from dsmini.config.run import DataConfig, RunConfig, TrainConfig

__all__ = ["DataConfig", "ModelConfig", "RunConfig", "TrainConfig", "layer_config", "mask_function", "require_subclass"]
