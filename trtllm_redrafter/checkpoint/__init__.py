"""The TensorRT-LLM checkpoint format: config, tensor layout per rank, reader, writer, manifest, checks."""

from trtllm_redrafter.checkpoint.config import CheckpointConfig
from trtllm_redrafter.checkpoint.manifest import Manifest
from trtllm_redrafter.checkpoint.reader import Checkpoint

__all__ = ["Checkpoint", "CheckpointConfig", "Manifest"]
