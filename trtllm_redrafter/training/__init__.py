"""Train a drafter for a frozen base model, and measure what one will bring.

    from trtllm_redrafter.training import evaluate, plan_training, train

    plan = plan_training(options)            # TrainOptions; writes nothing
    result = train(plan, progress)
    report = evaluate(options, progress)     # EvaluateOptions

transformers is imported only by what runs or tokenizes with it.
"""

from trtllm_redrafter.training.answers import WritingOptions, engine_writer
from trtllm_redrafter.training.evaluation import EvaluateOptions, EvaluationReport, evaluate
from trtllm_redrafter.training.execute import TrainResult, train
from trtllm_redrafter.training.loss import LossOptions
from trtllm_redrafter.training.model import HeadKind
from trtllm_redrafter.training.plan import TrainOptions, TrainPlan, plan_training
from trtllm_redrafter.training.trainer import FitOptions

__all__ = [
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
