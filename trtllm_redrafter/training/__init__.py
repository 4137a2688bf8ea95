"""Train a drafter for a frozen base model, and measure what one will bring.

    from trtllm_redrafter.training import evaluate, plan_training, train

    plan = plan_training(options)            # TrainOptions; writes nothing
    result = train(plan, progress)
    report = evaluate(options, progress)     # EvaluateOptions

transformers is imported only by what runs or tokenizes with it.
"""

from trtllm_redrafter.training.engine_writer import EngineWriterOptions, engine_writer
from trtllm_redrafter.training.evaluation import EvaluationReport, evaluate
from trtllm_redrafter.training.execute import TrainResult, train
from trtllm_redrafter.training.fit import FitOptions
from trtllm_redrafter.training.loss import LossOptions
from trtllm_redrafter.training.model import HeadKind
from trtllm_redrafter.training.options import EvaluateOptions, TrainOptions
from trtllm_redrafter.training.plan import TrainPlan, plan_training
from trtllm_redrafter.training.self_distill import WritingOptions

__all__ = [
    "EngineWriterOptions",
    "EvaluateOptions",
    "EvaluationReport",
    "FitOptions",
    "HeadKind",
    "LossOptions",
    "TrainOptions",
    "TrainPlan",
    "TrainResult",
    "WritingOptions",
    "engine_writer",
    "evaluate",
    "plan_training",
    "train",
]
