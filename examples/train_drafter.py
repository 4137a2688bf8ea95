"""Train a drafter for a base model, end to end, and measure what it brings. Everything is made here and is tiny.

What it shows:

1. A base model: a two-layer LLaMA that reads bytes, trained for a few seconds on sentences of a small grammar. With a
   real base model this step falls away: pass its directory.
2. `train` from prompts alone: the base model writes the answers, its hidden states are cached, the drafter is trained
   on them. The recipe keys below are those of `trtllm-redrafter train --set ...` and of a YAML recipe.
3. `evaluate` before anything is built: tokens per step for every setting of a grid, on prompts it was not trained on.
4. The engine agrees: converted, built and run, the same prompts take as many steps as `evaluate` said.

From the repository's root:

    .venv/bin/python examples/train_drafter.py

About 20 seconds on one CPU core.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trtllm_redrafter import build, convert, load_engine
from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.run.options import evaluate_options, train_options
from trtllm_redrafter.settings import flag_layers, resolve
from trtllm_redrafter.training import evaluate, plan_training, train

ARTICLES = ("the", "a", "one", "every")
ADJECTIVES = ("old", "small", "quiet", "golden", "curious", "northern")
NOUNS = ("river", "fox", "teacher", "garden", "lantern", "village", "mountain")
VERBS = ("finds", "remembers", "follows", "carries", "watches")


def sentence(chance: random.Random) -> str:
    words = [chance.choice(kind) for kind in (ARTICLES, ADJECTIVES, NOUNS, VERBS, ARTICLES, ADJECTIVES, NOUNS)]
    return " ".join(words) + ". "


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, behind the three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {byte: number for number, byte in enumerate(alphabet, start=3)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_base(folder: Path, chance: random.Random, *, steps: int = 250) -> Path:
    """A Hugging Face model directory, trained with the plain next-token loss."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        text = "".join(sentence(chance) for _ in range(64))
        ids = torch.tensor(tokenizer.encode(text)[: 16 * 128]).view(16, 128)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"base model, step {step + 1}: loss {loss.item():.2f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_prompts(path: Path, chance: random.Random, count: int) -> Path:
    lines = [json.dumps({"prompt": sentence(chance) + chance.choice(ARTICLES)}) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def main() -> None:
    torch.manual_seed(0)
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "base", chance)
        prompts = write_prompts(folder / "prompts.jsonl", chance, 64)
        held_out = write_prompts(folder / "held_out.jsonl", chance, 8)

        recipe = {
            "base": base,
            "drafter": folder / "drafter",
            "train.prompts": prompts,
            "train.work_dir": folder / "work",
            "train.draft_len": 4,
            "train.num_layers": 1,
            "train.max_steps": 250,
            "train.warmup_steps": 20,
            "train.learning_rate": 5e-3,
            "train.window": 64,
            "train.max_answer_tokens": 96,
            "train.draft_vocab": 0,
            "train.full_windows": 16,
            "train.grid": "1x4",
            "evaluate.prompts": held_out,
            "evaluate.grid": "1x2,1x4,3x4",
            "evaluate.max_tokens": 96,
        }
        resolved = resolve(flag_layers({key: (key, value) for key, value in recipe.items()}))

        plan = plan_training(train_options(resolved, resume=False, overwrite=False))
        print(plan.render())
        drafter = train(plan, no_progress).output
        report = evaluate(evaluate_options(resolved, overwrite=False), no_progress)
        print(report.render())

        shape = report.best.shape
        checkpoint = convert(
            base, folder / "checkpoint", drafter=drafter, num_beams=shape.num_beams, draft_len=shape.draft_len
        )
        with load_engine(build(checkpoint, folder / "engine", max_seq_len=256)) as engine:
            texts = [json.loads(line)["prompt"] for line in held_out.read_text().splitlines()]
            results = engine.generate(texts, max_tokens=96)
        print(f"> {texts[0]} ...{results[0].text}")
        steps = sum(result.steps for result in results)
        brought = 1 + sum(result.accepted_tokens for result in results) / steps
        print(f"\nengine at {shape.num_beams}x{shape.draft_len}: {brought:.2f} tokens per step")
        print(f"evaluate said:  {report.best.acceptance_length:.2f}")


if __name__ == "__main__":
    main()
