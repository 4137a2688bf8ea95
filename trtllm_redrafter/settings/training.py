"""Settings of `train` and `evaluate`: two sections of the schema, in a file of their own.

Defaults follow what the demo drafter's training taught (docs/training.md): distillation from a sharpened teacher, a
head that borrows the base model's, most windows' loss over the frequent tokens alone.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.settings.base import Directory, Positive, Section

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DEFAULT_GRID = "1x3,1x5,2x3,2x5,4x4,5x5,8x5"


def parse_grid(text: str) -> tuple[DraftShape, ...]:
    """`1x3,4x4` → shapes. Raises `ValueError` for anything else."""
    shapes = []
    for item in text.split(","):
        beams, cross, length = item.strip().partition("x")
        if not cross or not beams.isdigit() or not length.isdigit():
            raise ValueError(f"{item.strip()!r} is not BEAMSxLENGTH, as 4x4")
        shapes.append(DraftShape(int(beams), int(length)))
    return tuple(shapes)


def _checked_grid(text: str) -> str:
    parse_grid(text)
    return text


Grid = Annotated[str, AfterValidator(_checked_grid)]


class TrainSection(Section):
    """text → drafter."""

    data: Directory | None = Field(default=None, description="JSONL file of texts: `messages` or `text` per line")
    prompts: Directory | None = Field(
        default=None, description="JSONL file of prompts; the base model writes the answers"
    )
    work_dir: Directory | None = Field(
        default=None, description="answers, hidden states, log, training state; derived: runs/train-<drafter>"
    )
    draft_len: Positive = Field(default=5, description="future positions the drafter learns")
    num_layers: Positive = Field(default=4, description="residual blocks")
    exit_dim: Positive | None = Field(
        default=None, description="width of the blocks; derived: twice the hidden size, once for a tied head"
    )
    rnn: bool = Field(default=True, description="recurrence with weights; without: a sum of embeddings")
    head: Literal["full", "tied", "factor"] = Field(
        default="factor", description="LM head: own matrix, the base model's, or the base model's times a small matrix"
    )
    epochs: AboveZero | None = Field(default=None, description="passes over the text; derived: 4 without max_steps")
    max_steps: Positive | None = Field(default=None, description="optimizer steps, instead of epochs")
    learning_rate: AboveZero = Field(default=1e-3, description="highest rate of AdamW")
    final_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.0, description="rate at the end, as a share of the highest"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="how the rate falls")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=100, description="steps in which the rate rises")
    weight_decay: Weight = Field(default=0.01, description="AdamW's weight decay")
    clip_norm: AboveZero = Field(default=1.0, description="largest norm of a gradient")
    window: Positive = Field(default=256, description="neighbouring tokens that are read together")
    windows: Positive = Field(default=16, description="windows in a step")
    full_windows: Annotated[int, Field(ge=0)] = Field(
        default=2, description="windows whose loss covers the whole vocabulary; the others: the frequent tokens"
    )
    accumulation: Positive = Field(default=1, description="parts a step's windows are computed in")
    kd_weight: Weight = Field(default=0.9, description="weight of the base model's distribution as the target")
    ce_weight: Weight = Field(default=0.1, description="weight of the token itself as the target")
    kd_temperature: AboveZero = Field(default=0.5, description="teacher's temperature; below 1 favours greedy decoding")
    position_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.85, description="weight of each future position relative to the one before"
    )
    chunk_windows: Positive = Field(default=4, description="windows whose logits are held at a time")
    compile: bool = Field(default=False, description="compile the loss with torch.compile; worth it on a GPU")
    autocast: bool | None = Field(default=None, description="bfloat16 autocast; derived: on for a GPU")
    max_text_tokens: Positive = Field(default=2048, description="longest text or prompt, in tokens")
    max_answer_tokens: Positive = Field(default=256, description="longest answer the base model writes")
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = Field(
        default=0.0, description="of the answers the base model writes; 0 is greedy"
    )
    batch: Positive = Field(default=64, description="prompts answered together")
    batch_tokens: Positive = Field(default=8192, description="tokens the base model reads together")
    held_out: Share = Field(default=0.02, description="share of the texts to measure on, never trained on")
    grid: Grid = Field(default=DEFAULT_GRID, description="settings to measure at the end")
    draft_vocab: Annotated[int, Field(ge=0)] = Field(
        default=16384, description="frequent tokens listed for fast heads; 0: none"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(default=1, description="order of windows, sampled answers")
    save_every: Positive = Field(default=500, description="steps between saves of the training state")
    log_every: Positive = Field(default=20, description="steps between lines of metrics.jsonl")
    dtype: Dtype = Field(default="auto", description="of the base model's pass; auto: its own")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, ...")


class EvaluateSection(Section):
    """drafter → tokens per step."""

    prompts: Directory | None = Field(default=None, description="JSONL file of prompts, with `category` if it has any")
    grid: Grid = Field(default=DEFAULT_GRID, description="settings BEAMSxLENGTH; derived: those the drafter can do")
    max_tokens: Positive = Field(default=128, description="tokens the base model writes per prompt")
    draft_vocab: bool = Field(default=False, description="compute the head on the listed frequent tokens alone")
    min_acceptance: Annotated[float, Field(ge=1.0)] | None = Field(
        default=None, description="tokens per step the best setting must reach; below: exit code 8"
    )
    report: Directory | None = Field(default=None, description="directory for the report")
    max_text_tokens: Positive = Field(default=2048, description="longest prompt, in tokens")
    batch: Positive = Field(default=32, description="prompts answered together")
    batch_tokens: Positive = Field(default=8192, description="tokens the base model reads together")
    batch_rows: Positive = Field(default=256, description="positions drafted from together")
    dtype: Dtype = Field(default="auto", description="of the base model's pass; auto: its own")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, ...")
