"""A drafter's directory: its settings, its tensors under TensorRT-LLM's names, and everything wrong with them.

    drafter = DrafterFiles.open(Path("redrafter_vicuna-7b_n_5_lr_0.001_layers_2"))
    drafter.tensors["rnn_u.weight"].shape, drafter.problems

Weights are safetensors or `.pt`, whoever trained them. Nothing is loaded: tensors stay where they are until the
conversion streams them. Layouts, for K layers (all hold rnn_u.*, rnn_w.weight and maybe input_proj.* / input_projs.*):

    lm_head.{i}.linear.*   lm_head.{K}.weight       Apple
    lm_heads.{i}.linear.*  lm_heads.{K}.weight
    0.{i}.linear.*         0.{K}.weight             a bare nn.Sequential
    layers.{i}.linear.*    lm_head.weight           TensorRT-LLM

No tensor may be missing or left over: a part that is dropped changes what is drafted, and shows only as a low
acceptance. Such problems are listed, not raised, so that they are reported beside what does not fit the base.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trtllm_redrafter.checkpoint.draft_vocab import draft_vocab_problems
from trtllm_redrafter.checkpoint.names import DRAFT_VOCAB_FILE, DRAFTER, LM_HEAD
from trtllm_redrafter.checkpoint.safetensors_io import SafetensorsFile
from trtllm_redrafter.checkpoint.stored_tensor import STORED_DTYPES
from trtllm_redrafter.conversion.drafter_config import DrafterSettings, read_drafter_config
from trtllm_redrafter.conversion.sources import LoadedTensor, LowRankSource, Source
from trtllm_redrafter.errors import InputError, Problem
from trtllm_redrafter.paths import check_regular
from trtllm_redrafter.redrafter.config import DrafterConfig

WEIGHT_FILES = ("model.safetensors", "model.pt", "pytorch_model.bin")

FACTOR = "lm_head_factor.weight"
"""A small matrix: the LM head is the base's LM head times this."""

_STEM = r"(?:lm_heads?|0)"
NAME_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"input_projs?(?:\.0)?\.(weight|bias)"), r"input_proj.\1"),
    (re.compile(_STEM + r"\.(\d+)\.linear\.(weight|bias)"), r"layers.\1.linear.\2"),
    (re.compile(r"layers\.(\d+)\.linear\.(weight|bias)"), r"layers.\1.linear.\2"),
    (re.compile(_STEM + r"\.(\d+)\.weight"), r"head.\1"),
    (re.compile(r"lm_head\.weight"), LM_HEAD),
    (re.compile(r"(rnn_u\.weight|rnn_u\.bias|rnn_w\.weight|lm_head_factor\.weight)"), r"\1"),
)
"""File name → TensorRT-LLM's, tried in order; `head.K` becomes the LM head when K is the number of layers."""

WRAPPERS = ("module", "_orig_mod")
"""Parts of a name that say how the drafter was run when it was saved, at any place in it."""


def weight_file(path: Path) -> Path:
    """The weights of the drafter in directory `path`."""
    for name in WEIGHT_FILES:
        if (path / name).exists():
            return path / name
    raise InputError(
        "the drafter has no weights",
        where=path,
        why=f"none of {', '.join(WEIGHT_FILES)} is there",
        remedy="check --drafter, or save the drafter as model.safetensors",
    )


def read_weights(path: Path, num_layers: int) -> tuple[dict[str, Source], list[Problem]]:
    """The tensors of a weight file by TensorRT-LLM's names; unknown ones and two for one name are problems."""
    tensors: Mapping[str, Source]
    tensors = SafetensorsFile.open(path) if path.suffix == ".safetensors" else _load_pickle(path)
    renamed: dict[str, Source] = {}
    problems = []
    for name, source in tensors.items():
        target = _target_name(_plain_name(name), num_layers)
        if target is None:
            what = f"tensor {name!r} has no place in a drafter"
            why = "without it the drafter would compute something else"
            problems.append(Problem(what, str(path), why, "check num_draft_layers in its config.json"))
        elif target in renamed:
            problems.append(Problem(f"tensor {name!r} is a second {target!r}", str(path), None, "remove one of them"))
        else:
            renamed[target] = source
    return renamed, problems


def _load_pickle(path: Path) -> dict[str, Source]:
    """A state dict saved by torch.save. `weights_only` keeps a pickle from running code."""
    import pickle

    import torch

    refusal = InputError(
        "the file is not a plain dictionary of tensors",
        where=path,
        why="pickles can hold code; only tensors are read from them",
        remedy="save it again with torch.save(model.state_dict(), ...) or, better, as safetensors",
    )
    check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols; what is read is checked below
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (
        pickle.UnpicklingError,
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as e:
        raise refusal from e
    if not isinstance(value, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout is torch.strided and v.dtype in STORED_DTYPES
        for k, v in value.items()
    ):
        raise refusal
    return {name: LoadedTensor(name, path, tensor.detach()) for name, tensor in value.items()}


def _plain_name(name: str) -> str:
    """Without the wrappers of DistributedDataParallel (`module.`), torch.compile (`_orig_mod.`) and TensorRT-LLM."""
    inner = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return inner.removeprefix(DRAFTER)


def _target_name(name: str, num_layers: int) -> str | None:
    for pattern, template in NAME_PATTERNS:
        if match := pattern.fullmatch(name):
            target = match.expand(template)
            if not target.startswith("head."):
                return target
            return LM_HEAD if target == f"head.{num_layers}" else None
    return None


@dataclass(frozen=True)
class DrafterFiles(DrafterSettings):
    """An opened drafter: its settings, its tensors by TensorRT-LLM's names, and what is wrong with them."""

    tensors: Mapping[str, Source] = field(default_factory=dict)
    factor: Source | None = None
    files: tuple[Path, ...] = ()
    draft_vocab: Path | None = None
    problems: tuple[Problem, ...] = ()

    @classmethod
    def open(cls, path: Path) -> DrafterFiles:
        """Read config and headers.

        `InputError` when a file cannot be read; tensors that do not fit end up in `problems`, so that the caller can
        report them beside what does not fit the base.
        """
        settings = read_drafter_config(path)
        config, weights = settings.config, weight_file(path)
        tensors, problems = read_weights(weights, config.num_layers)
        factor = tensors.pop(FACTOR, None)
        problems += _tensor_problems(config, tensors, factor, settings.tie_lm_head, weights)
        vocab = path / DRAFT_VOCAB_FILE if (path / DRAFT_VOCAB_FILE).exists() else None
        problems += [] if vocab is None else draft_vocab_problems(vocab, config.vocab_size)
        return cls(
            **vars(settings),
            tensors=tensors,
            factor=factor,
            files=tuple(p for p in (path / "config.json", weights, vocab) if p is not None),
            draft_vocab=vocab,
            problems=tuple(problems),
        )

    def sources(self, head: tuple[Source, ...]) -> dict[str, tuple[Source, ...]]:
        """What each tensor is made of; a tied LM head is the base's `head`, or `head` times the factor."""
        sources: dict[str, tuple[Source, ...]] = {name: (tensor,) for name, tensor in self.tensors.items()}
        if self.tie_lm_head:
            assert head
            sources[LM_HEAD] = head if self.factor is None else (LowRankSource(head, self.factor),)
        return sources


def _tensor_problems(
    config: DrafterConfig, tensors: Mapping[str, Source], factor: Source | None, tied: bool, path: Path
) -> Iterator[Problem]:
    expected = config.parameter_shapes()
    if tied:
        del expected[LM_HEAD]
        yield from _tied_problems(config, tensors, factor, path)
    elif factor is not None:
        remedy = "set tie_lm_head to true in its config.json"
        yield Problem(f"{FACTOR!r} is there, but tie_lm_head is not true", str(path), None, remedy)
    for name, shape in expected.items():
        source = tensors.get(name)
        if source is None:
            why = "TensorRT-LLM would load such a drafter without an error" if name == LM_HEAD else None
            yield Problem(f"the drafter has no {name!r}", str(path), why, "use the complete drafter")
        elif source.shape != shape:
            why = f"its config.json implies {list(shape)}, the file has {list(source.shape)}"
            yield Problem(f"the drafter's {name!r} has the wrong shape", str(path), why, "use the right config.json")
        elif source.dtype not in ("F16", "BF16", "F32"):
            why = f"it is {source.dtype}; F16, BF16 or F32 is needed"
            yield Problem(f"the drafter's {name!r} is not a floating tensor", str(path), why, "save it as bfloat16")
    allowed = {*expected, LM_HEAD} if tied else set(expected)
    for name in sorted(set(tensors) - allowed):
        why = "with rnn false or exit_dim twice the hidden size, some parts do not exist"
        yield Problem(f"the drafter has {name!r}, its config.json has no place for it", str(path), why, "correct it")


def _tied_problems(
    config: DrafterConfig, tensors: Mapping[str, Source], factor: Source | None, path: Path
) -> Iterator[Problem]:
    if LM_HEAD in tensors:
        yield Problem("tie_lm_head is true, but the file has an LM head", str(path), None, "remove one of the two")
    width = (config.hidden_size, config.exit_dim)
    if factor is None and config.hidden_size != config.exit_dim:
        yield Problem(
            f"tie_lm_head is true, but exit_dim {config.exit_dim} is not the hidden size {config.hidden_size}",
            str(path),
            f"the base's LM head has {config.hidden_size} columns, and there is no {FACTOR!r}",
            "use the complete drafter",
        )
    elif factor is not None and (factor.shape != width or factor.dtype not in ("F16", "BF16", "F32")):
        why = f"floating {list(width)} is needed, the file has {factor.dtype} {list(factor.shape)}"
        yield Problem(f"{FACTOR!r} does not fit", str(path), why, "use the right config.json")
