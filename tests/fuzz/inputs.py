"""Real small inputs of every kind, made once: what the campaign breaks.

base/ base16/ sharded/      Hugging Face models with tokenizer: float32, bfloat16, in three shards
drafter/ drafter16/ pickled/ for them; the last one as pytorch_model.bin
checkpoint/ two/ c16/       converted: one rank, two ranks, bfloat16 (native kernels where there is a compiler)
engine/ e16/ trt/           of the torch backend; a TensorRT-LLM engine directory whose plan is no plan
prompts.jsonl data.jsonl    for run, bench, evaluate, train
recipe.yaml result.json report.json
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from tests.engines import write_tokenizer
from tests.tiny_models import write_base, write_drafter
from trtllm_redrafter.checkpoint.manifest import Manifest, record_tree
from trtllm_redrafter.run import api

VOCAB = 259
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
SIZES = {"max_seq_len": 96, "max_batch_size": 2}


def make_inputs(path: Path) -> Path:
    """Everything below `path`; a few seconds."""
    torch.manual_seed(0)
    wide = {"hidden_size": 32, "intermediate_size": 32, "torch_dtype": "bfloat16", "head_dim": 32}
    write_base(path / "base", "llama", vocab_size=VOCAB, tie_word_embeddings=True, head_dim=32)
    write_base(path / "base16", "llama", vocab_size=VOCAB, **wide)
    write_base(path / "sharded", "qwen3", vocab_size=VOCAB, shards=3)
    for name in ("base", "base16", "sharded"):
        write_tokenizer(path / name)
        (path / name / "chat_template.jinja").write_text(CHAT)
    write_drafter(path / "drafter", vocab_size=VOCAB, draft_len=3)
    write_drafter(path / "drafter16", vocab_size=VOCAB, draft_len=3, dtype=torch.bfloat16)
    write_drafter(path / "pickled", vocab_size=VOCAB, draft_len=3, file="pytorch_model.bin")
    for base, drafter, output, tp in (
        ("base", "drafter", "checkpoint", 1),
        ("base16", "drafter16", "c16", 1),
    ):
        api.convert(path / base, path / output, drafter=path / drafter, num_beams=2, tp_size=tp)
    api.convert(path / "sharded", path / "two", tp_size=2)
    api.build(path / "checkpoint", path / "engine", **SIZES)
    api.build(path / "c16", path / "e16", **SIZES)
    _write_tensorrt_engine(path / "trt", path / "checkpoint")
    _write_texts(path)
    return path


def _write_tensorrt_engine(engine: Path, checkpoint: Path) -> None:
    """What `build` leaves on a GPU host, with a file of zeros for the compiled plan."""
    engine.mkdir()
    pretrained = json.loads((checkpoint / "config.json").read_text())
    limits = {"max_batch_size": 4, "max_input_len": 90, "max_seq_len": 102, "max_beam_width": 1}
    config = {"version": "1.2.1", "pretrained_config": pretrained, "build_config": limits}
    (engine / "config.json").write_text(json.dumps(config))
    (engine / "rank0.engine").write_bytes(bytes(64))
    runtime = {"kv_cache_fraction": 0.9, "block_reuse": False, "multi_block_mode": True, "api": "executor"}
    gpu = {"name": "NVIDIA H100 80GB HBM3", "compute_capability": [9, 0]}
    notes = {"format": 1, "backend": "tensorrt-llm", "version": "1", "gpu": gpu, "dtype": "float32", "runtime": runtime}
    (engine / "redrafter.json").write_text(json.dumps(notes))
    shutil.copytree(checkpoint / "tokenizer", engine / "tokenizer")
    Manifest("engine", {}, {}, {"versions": {"tensorrt": "10.0"}}, record_tree(engine)).write(engine)


def _write_texts(path: Path) -> None:
    prompts = [
        {"prompt": "why is the sky blue", "max_tokens": 3},
        {"messages": [{"role": "user", "content": "bread?"}], "max_tokens": 2, "temperature": 0.7, "seed": 1},
        {"id": "third", "prompt": "a", "max_tokens": 2, "stop": ["x"], "top_k": 5, "top_p": 0.9, "draft": False},
    ]
    plain = [{"prompt": "why is the sky blue"}, {"prompt": "bread"}]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
    (path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    (path / "plain.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plain))
    (path / "data.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns}) + "\n")
    (path / "recipe.yaml").write_text(RECIPE)
    row = {"setting": "2x3", "acceptance_length": 2.1, "interval_95": [2.0, 2.2]}
    report = {"base": "base", "drafter": "drafter", "prompts": 4, "tokens": 100, "acceptance": [row]}
    (path / "report.json").write_text(json.dumps(report))


RECIPE = """\
base: base
drafter: drafter
work_dir: work
engine: engine
convert: {num_beams: 2, draft_len: 3, dtype: bfloat16}
build: {max_batch_size: 2, max_input_len: 40, max_seq_len: 96}
run:
  prompts: [hello]
  max_tokens: 2
  temperature: 0.5
  seed: 3
  stop: ["x"]
bench: {max_tokens: 2, batch: "1", limit: 1, repeats: 3, prompts: plain.jsonl}
tune: {grid: "1x2,2x2", batch: "1", budget: 0, limit: 1, max_tokens: 2, prompts: plain.jsonl, target: h100-80gb}
train: {data: data.jsonl, draft_len: 2}
plan: {acceptance_length: 1.5}
tensorrt_llm: {gpu: h100-80gb, version: 1.2.1}
"""
