"""Recipe → convert → build → run, each stage skipped when its inputs and options have not changed."""

from trtllm_redrafter.pipeline.stages import PipelinePlan, StagePlan, plan_pipeline, record_run, run_pipeline

__all__ = ["PipelinePlan", "StagePlan", "plan_pipeline", "record_run", "run_pipeline"]
