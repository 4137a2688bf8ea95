"""Every setting of the pipeline: its type, its bounds, its default and its help text, each in this package alone.

YAML recipes, `--set key=value` and the flags of the commands all fill this one schema, under the same dotted names
(`convert.num_beams`). Packages above this one take sections as they are; for those below, `values.fill` copies fields
of the same names into their own option classes. None means "derived": from the drafter, the checkpoint or the recipe's
name, and shown before it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.fields import FieldInfo

from trtllm_redrafter.settings.values import (
    AboveZero,
    AcceptanceLength,
    Batches,
    Device,
    Directory,
    Dtype,
    Grid,
    Positive,
    Section,
    TemplateKwargs,
    Text,
    TokenId,
    Weight,
)

MAX_SEQ_LEN = 2048
"""Upper bound of the derived `build.max_seq_len`: the KV cache of a 128k context would take most of the memory."""

DEFAULT_GRID = "1x3,1x5,2x3,2x5,4x4,5x5,8x5"


class ConvertSection(Section):
    """base model + drafter → checkpoint."""

    dtype: Dtype = Field(default="auto", description="auto: the base model's own")
    tp_size: Positive = Field(default=1, description="GPUs that share each layer (tensor parallelism)")
    num_beams: Positive | None = Field(
        default=None, description="beams drafted per step; derived: the drafter's, else NVIDIA's default, 5"
    )
    draft_len: Positive | None = Field(
        default=None,
        description="tokens drafted per beam, without the guaranteed one; derived: what the drafter was trained for",
    )
    greedy: bool = Field(
        default=True, description="TensorRT-LLM's verification mode; the other backends do both at any time"
    )
    parallel_embedding: bool = Field(default=False, description="split the embedding over the ranks")
    lm_head: Literal["auto", "embedding", "file"] = Field(
        default="auto",
        description="LM head of a base that ties it but holds another one; auto: as config.json says, with a note",
    )
    workers: Positive = Field(default=1, description="ranks written at the same time")


class BuildSection(Section):
    """checkpoint → engine."""

    tokenizer: Directory | None = Field(
        default=None, description="directory of the tokenizer; derived: the base model's"
    )
    max_batch_size: Positive = Field(default=8, description="requests that run together")
    max_input_len: Positive | None = Field(
        default=None, description="longest prompt, in tokens; derived: max_seq_len - 1"
    )
    max_seq_len: Positive | None = Field(
        default=None, description=f"longest prompt and answer together; derived: the model's, at most {MAX_SEQ_LEN}"
    )


class RunSection(Section):
    """engine → text."""

    prompts: tuple[Text, ...] = Field(
        default=(), strict=False, description="texts to continue or to answer; - reads standard input"
    )
    input: Directory | None = Field(default=None, description="JSONL file with `prompt` or `messages` per line")
    output: Directory | None = Field(default=None, description="JSONL file for the results")
    chat: bool | None = Field(
        default=None, description="put prompts through the chat template; derived: if the engine has one"
    )
    max_tokens: Positive = Field(default=128, description="tokens to write per prompt")
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = Field(default=0.0, description="0 is greedy")
    top_k: Annotated[int, Field(ge=0)] = Field(default=0, description="keep the k likeliest tokens; 0 is off")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="keep the likeliest p of the mass; 1 is off"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(default=None, description="derived: a new one each time")
    stop: tuple[Text, ...] = Field(
        default=(), strict=False, description="strings that end an answer; special tokens too"
    )
    stop_token_ids: tuple[TokenId, ...] = Field(default=(), strict=False, description="token ids that end an answer")
    skip_special_tokens: bool = Field(default=True, description="leave special tokens out of the text")
    num_beams: Positive | None = Field(default=None, description="beams drafted per step; derived: the engine's")
    draft_len: Positive | None = Field(default=None, description="tokens drafted per beam; derived: the engine's")
    draft: bool = Field(default=True, description="decode with the engine's drafter")
    device: Device = Field(default="auto", description="auto, cpu, cuda, cuda:1, ...")


class TensorRTLLMSection(Section):
    """Settings of the tensorrt-llm backend only, for building and running."""

    version: Text = Field(default="1.2.1", description="TensorRT-LLM release that will build and run the engine")
    gpu: Text = Field(default="h100-80gb", description="GPU that will run the engine; not for torch")
    gemm_plugin: Literal["auto", "float16", "bfloat16", "fp8", "disable"] | None = Field(
        default=None, description="matrix products; derived: fp8 for an FP8 base, else the model's dtype"
    )
    max_num_tokens: Positive | None = Field(
        default=None, description="tokens of one step over all requests; derived: a full prompt beside full drafting"
    )
    opt_batch_size: Positive | None = Field(
        default=None, description="requests per step that kernels are tuned for; derived: max_batch_size"
    )
    allow_sampling: bool = Field(
        default=False, description="build a sampling engine although its acceptance rule is not exact"
    )
    flags: dict[str, str | int | bool] = Field(
        default={}, description="further trtllm-build flags by name, as reduce_fusion: disable"
    )
    workers: Positive = Field(default=1, description="ranks built at the same time")
    cache: bool = Field(default=True, description="reuse an engine built from the same content on the same GPU")
    cache_dir: Directory = Field(
        default=Path("~/.cache/trtllm-redrafter"), validate_default=True, description="engines and timing caches"
    )
    kv_cache_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.9, description="share of the memory left after loading that the KV cache takes"
    )
    block_reuse: bool = Field(
        default=False, description="share KV blocks of equal prefixes; not verified with ReDrafter"
    )
    multi_block_mode: bool = Field(default=True, description="split long contexts over more of the GPU")
    api: Literal["executor", "llm"] | None = Field(
        default=None,
        description="interface that runs a TensorRT-LLM engine (llm: the LLM API); derived: the one it was built for, "
        "at first executor",
    )


class CompilerSection(Section):
    """What only the tensorrt backend takes. The GPU is that of the section tensorrt_llm."""

    compiler: Literal["auto", "tensorrt-rtx", "tensorrt"] = Field(
        default="auto",
        description="what compiles engines of the tensorrt backend; auto: tensorrt-rtx for the GPUs it knows, else "
        "tensorrt",
    )
    weights: Literal["inputs", "inside"] = Field(
        default="inputs", description="inputs: weights stay in the checkpoint; inside: each plan holds them"
    )
    executor: Literal["tensorrt", "onnxruntime"] = Field(
        default="tensorrt", description="what runs engines of the tensorrt backend; onnxruntime: on a CPU too"
    )


class PlanSection(Section):
    """Assumptions of the memory and latency plans."""

    acceptance_length: AcceptanceLength = Field(
        default=None, description="tokens per step, or a report of `evaluate`; without it only break-even is shown"
    )
    context_len: Positive | None = Field(
        default=None, description="tokens a request has in the cache on average; derived: half of max_seq_len"
    )
    bandwidth_efficiency: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.78, description="share of the peak memory bandwidth that kernels reach; measured on an H200"
    )
    compute_efficiency: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.63, description="share of the peak arithmetic rate that kernels reach; measured on an H200"
    )
    kernel_us: Annotated[float, Field(ge=0.0)] = Field(
        default=2.2, description="microseconds that each kernel costs beyond its bytes and arithmetic; the same"
    )


class TrainSection(Section):
    """text → drafter.

    Defaults follow what the demo drafter's training taught (docs/training.md): distillation from a sharpened teacher, a
    head that borrows the base model's, most windows' loss over the frequent tokens alone.
    """

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
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.02, description="share of the texts to measure on, never trained on"
    )
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
    grid: Grid = Field(
        default=DEFAULT_GRID, description="settings BEAMSxLENGTH; derived: what the drafter can do of these"
    )
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


class BenchSection(Section):
    """engine → does drafting pay."""

    prompts: Directory | None = Field(
        default=None, description="JSONL file of prompts, or Spec-Bench's questions; derived: the built-in eighty"
    )
    batch: Batches = Field(default="1,4", description="batch sizes, as 1,4,16")
    max_tokens: Positive = Field(default=128, description="tokens to write per prompt")
    repeats: Annotated[int, Field(ge=3)] = Field(default=3, description="times each prompt is measured, at least 3")
    limit: Positive | None = Field(default=None, description="prompts taken, evenly over the file; derived: all")
    warmup: Positive = Field(default=2, description="rounds per batch size and side before the first that counts")
    report: Directory | None = Field(default=None, description="directory for the HTML, Markdown and JSON report")
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(default=0.95, description="level of the intervals")
    resamples: Annotated[int, Field(ge=100)] = Field(default=2000, description="draws of the bootstrap")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of the bootstrap")
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.02, description="loss of speed, as a share, that `bench compare` does not report"
    )


class TuneSection(Section):
    """recipe → which draft shape."""

    target: Text = Field(default="this", description="this machine, or a GPU of the table such as h100-80gb")
    prompts: Directory | None = Field(default=None, description="JSONL file of prompts; derived: the built-in eighty")
    grid: Grid = Field(
        default=DEFAULT_GRID, description="settings BEAMSxLENGTH; derived: what the drafter can do of these"
    )
    batch: Batches = Field(default="1,4", description="batch sizes, as 1,4,16")
    max_tokens: Positive = Field(default=128, description="tokens the base model writes per prompt")
    limit: Positive | None = Field(default=None, description="prompts taken, evenly over the file; derived: all")
    budget: Annotated[int, Field(ge=0)] = Field(default=0, description="best settings to measure after predicting")
    steps: Positive = Field(default=40, description="decoding steps timed per setting and batch size")
    report: Directory | None = Field(default=None, description="directory for the report")


class Recipe(Section):
    """A whole recipe. `checkpoint` and `engine` are the directories between its stages."""

    base: Directory | None = Field(default=None, description="Hugging Face directory of the base model")
    drafter: Directory | None = Field(default=None, description="directory of the ReDrafter head; none: no drafting")
    backend: Literal["torch", "tensorrt-llm", "tensorrt"] = Field(
        default="torch", description="what builds and executes the engine"
    )
    work_dir: Directory | None = Field(
        default=None, description="where the pipeline keeps its stages; derived: runs/<recipe>"
    )
    checkpoint: Directory | None = Field(
        default=None, description="checkpoint directory; derived: <work_dir>/checkpoint"
    )
    engine: Directory | None = Field(default=None, description="engine directory; derived: <work_dir>/engine")
    chat_template_kwargs: TemplateKwargs = Field(
        default={}, description="arguments of the chat template, as enable_thinking=false"
    )
    convert: ConvertSection = ConvertSection()
    build: BuildSection = BuildSection()
    run: RunSection = RunSection()
    tensorrt_llm: TensorRTLLMSection = TensorRTLLMSection()
    tensorrt: CompilerSection = CompilerSection()
    plan: PlanSection = PlanSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    bench: BenchSection = BenchSection()
    tune: TuneSection = TuneSection()


SECTIONS: dict[str, type[Section]] = {
    name: type(field.default) for name, field in Recipe.model_fields.items() if isinstance(field.default, Section)
}


def keys() -> dict[str, FieldInfo]:
    """Every dotted key and its field (type, default, description), in the schema's order."""
    found = {}
    for name, field in Recipe.model_fields.items():
        if name in SECTIONS:
            found.update({f"{name}.{key}": inner for key, inner in SECTIONS[name].model_fields.items()})
        else:
            found[name] = field
    return found
