"""What a model will need and cost on a GPU that is not here: memory per rank, time per step. Pure arithmetic, no GPU.

plan = memory_plan(config, limits, gpu("h100-80gb"), kv_cache_fraction=0.9)
plan.kv_tokens, plan.full_requests
"""

from trtllm_redrafter.planning.gpus import GPUS, Gpu, gpu
from trtllm_redrafter.planning.memory import Limits, MemoryPlan, memory_plan

__all__ = ["GPUS", "Gpu", "Limits", "MemoryPlan", "gpu", "memory_plan"]
