"""Every setting of the pipeline: its type, its bounds, its default and its help text, each in this package alone.

YAML recipes, `--set key=value` and the flags of the commands all fill this one schema, under the same dotted names
(`convert.num_beams`). Packages above this one take sections as they are; for those below, `base.fill` copies fields of
the same names into their own option classes. None means "derived": from the drafter, the checkpoint or the recipe's
name, and shown before it is used.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.fields import FieldInfo

from trtllm_redrafter.errors import InputError
from trtllm_redrafter.prompts.messages import check_template_kwargs
from trtllm_redrafter.settings.base import Device, Directory, Positive, Section, Text
from trtllm_redrafter.settings.benchmark import BenchSection, TuneSection
from trtllm_redrafter.settings.training import EvaluateSection, TrainSection

MAX_SEQ_LEN = 2048
"""Upper bound of the derived `build.max_seq_len`: a 128k context would reserve a KV cache nobody asked for."""


TokenId = Annotated[int, Field(ge=0)]


def _template_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    try:
        return check_template_kwargs(values)
    except InputError as error:
        raise ValueError(error.problem.remedy or error.problem.what) from error


TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_template_kwargs)]


class ConvertSection(Section):
    """base model + drafter → checkpoint."""

    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        default="auto", description="auto: the base model's own"
    )
    tp_size: Positive = Field(default=1, description="GPUs that share each layer (tensor parallelism)")
    num_beams: Positive | None = Field(
        default=None, description="beams drafted per step; derived: the drafter's, else NVIDIA's default, 5"
    )
    draft_len: Positive | None = Field(
        default=None,
        description="tokens drafted per beam, without the guaranteed one; derived: what the drafter was trained for",
    )
    greedy: bool = Field(
        default=True, description="TensorRT-LLM's verification mode; the torch backend does both at any time"
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

    prompts: tuple[Text, ...] = Field(default=(), strict=False, description="texts to continue or to answer")
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


class TensorRTSection(Section):
    """What only the tensorrt-llm backend takes, at build time and for running what it built."""

    version: Text = Field(default="1.2.1", description="TensorRT-LLM release that will build and run the engine")
    gpu: Text = Field(default="h100-80gb", description="GPU that will run the engine")
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
        default=False, description="share KV blocks of equal prefixes; nobody has verified it with ReDrafter"
    )
    multi_block_mode: bool = Field(default=True, description="split long contexts over more of the GPU")
    api: Literal["executor", "llm"] | None = Field(
        default=None,
        description="interface that runs a TensorRT engine (llm: the LLM API); derived: the one it was built for, at "
        "first executor",
    )


def _acceptance_length(value: Any) -> float | Path | None:
    """A number, or a path to what has it; one message for both."""
    if value is None or isinstance(value, Path):
        return value
    if isinstance(value, str) and value.strip():
        return Path(value).expanduser()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 1.0 <= value <= sys.float_info.max:
        return float(value)
    raise ValueError("it should be tokens per step, at least 1, or the path of a report of `evaluate`")


class PlanSection(Section):
    """Assumptions of the memory and latency plans."""

    acceptance_length: Annotated[float | Path | None, BeforeValidator(_acceptance_length)] = Field(
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


class Recipe(Section):
    """The whole of it. `checkpoint` and `engine` are the directories between the stages."""

    base: Directory | None = Field(default=None, description="Hugging Face directory of the base model")
    drafter: Directory | None = Field(default=None, description="directory of the ReDrafter head; none: no drafting")
    backend: Literal["torch", "tensorrt-llm"] = Field(
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
    tensorrt_llm: TensorRTSection = TensorRTSection()
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
