"""Estimate a model's memory per rank and time per step on a target GPU, by arithmetic alone: no GPU is needed.

plan = estimate_memory(config, limits, gpu("h100-80gb"), kv_cache_fraction=0.9)
plan.kv_tokens, plan.full_requests
"""

from trtllm_redrafter.planning.gpus import GPUS, Gpu, gpu
from trtllm_redrafter.planning.memory import BuildLimits, MemoryEstimate, estimate_memory

__all__ = ["GPUS", "BuildLimits", "Gpu", "MemoryEstimate", "estimate_memory", "gpu"]
