"""Recipe → convert → build → run, each stage skipped when its inputs and options have not changed."""

from trtllm_redrafter.pipeline.stages import (
    PipelinePlan,
    StagePlan,
    begin_run,
    plan_pipeline,
    record_run,
    run_pipeline,
)

__all__ = ["PipelinePlan", "StagePlan", "begin_run", "plan_pipeline", "record_run", "run_pipeline"]
