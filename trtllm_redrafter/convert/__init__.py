"""Hugging Face base model (or TensorRT-LLM checkpoint) and drafter → TensorRT-LLM checkpoint.

The package's API has a function of the same name. Python binds `trtllm_redrafter.convert` to this module as soon as
anything imports it, so the module is callable and passes the call on: `from trtllm_redrafter import convert` works
in every order of imports.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from trtllm_redrafter.convert.against import verify
from trtllm_redrafter.convert.execute import convert
from trtllm_redrafter.convert.options import ConvertOptions
from trtllm_redrafter.convert.plan import ConversionPlan, plan_conversion

__all__ = ["ConversionPlan", "ConvertOptions", "convert", "plan_conversion", "verify"]


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        from trtllm_redrafter import api

        return api.convert(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
