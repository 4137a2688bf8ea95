"""ReDrafter speculative decoding on NVIDIA GPUs with TensorRT-LLM, and anywhere with PyTorch.

    from trtllm_redrafter import convert, build, load_engine

    convert(base="vicuna-7b", drafter="redrafter-vicuna-7b", output="checkpoint")
    build(checkpoint="checkpoint", output="engine")
    print(load_engine("engine").generate(["What is a tree?"])[0].text)

The functions are imported when they are first used: importing the package must not cost the seconds torch takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_redrafter.version import __version__

if TYPE_CHECKING:
    from trtllm_redrafter.run.api import Engine, build, convert, load_engine

__all__ = ["Engine", "__version__", "build", "convert", "load_engine"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from trtllm_redrafter.run import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
