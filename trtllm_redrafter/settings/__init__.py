"""The recipe: one schema for YAML files and flags, the only home of default values, with provenance of each."""

from trtllm_redrafter.settings.layers import Layer, Origin, Resolved, resolve
from trtllm_redrafter.settings.schema import Recipe
from trtllm_redrafter.settings.sources import file_layers, flag_layers, preset_layer, set_layer

__all__ = [
    "Layer",
    "Origin",
    "Recipe",
    "Resolved",
    "file_layers",
    "flag_layers",
    "preset_layer",
    "resolve",
    "set_layer",
]
