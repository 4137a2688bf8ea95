"""Train a drafter for Qwen2.5-Coder-1.5B-Instruct in phases, each a process of its own that can be cut short.

    python scripts/train_code_drafter.py write    --model DIR --work DIR --prompts prompts.jsonl --seconds 230
    python scripts/train_code_drafter.py train    --model DIR --work DIR --seconds 340 --output drafter
    python scripts/train_code_drafter.py measure  --model DIR --work DIR --drafter drafter --held-out a.jsonl,b.jsonl

`write` adds prompts that the model writes itself, answers all of them, greedily and then part of them sampled, and
keeps tokens and hidden states in parts of a few hundred thousand rows. `train` learns from the parts that are there;
how many steps fit into the time is measured first, so that the learning rate comes down in time. `measure` decodes
held-out prompts greedily and walks along them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from batch_llama import BatchLlama
from code_prompts import EIGHTY, Overlap, held_out_texts, load_parts, text_of, wrapped_stub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from smollm2_data import flatten
from train_smollm2_drafter import fit_options, parse_grid, say

from trtllm_redrafter.progress import no_progress
from trtllm_redrafter.redrafter.config import DrafterConfig
from trtllm_redrafter.training.acceptance import borrowed_head, evaluate_grid, token_accuracy
from trtllm_redrafter.training.drafter_files import frequent_tokens, read_drafter, write_drafter
from trtllm_redrafter.training.evaluation import draft_vocab
from trtllm_redrafter.training.frozen_base import base_identity, load_tokenizer
from trtllm_redrafter.training.model import DrafterSpec, HeadKind, InputScales, TrainableDrafter
from trtllm_redrafter.training.rows import TrainingRows
from trtllm_redrafter.training.trainer import BaseTensors, StepLog, Trainer

SETTINGS = Path(__file__).resolve().parent.parent / "configs" / "drafters" / "qwen2.5-coder-1.5b-instruct.json"
STUB_REQUEST = (
    "Write only the signature and the docstring of a Python function{about}. The docstring says in one to three "
    "sentences what the function does and shows two examples with >>>. Do not write the body."
)
HEAT = 0.95
"""Temperature of prompts."""

EXERCISE_REQUEST = "State one programming exercise{about} that a short function can solve. State only the exercise."


def render(tokenizer: Any, prompt: Any) -> list[int]:
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def write_texts(
    model: BatchLlama, tokenizer: Any, prompts: list[list[int]], tokens: int, *, cut: bool
) -> list[tuple[int, str]]:
    """Numbers of prompts and what was written to them; `cut`: also where the model had not come to an end."""
    answers = model.generate(prompts, tokens, HEAT)
    last = answers.tokens.gather(1, (answers.lengths - 1).unsqueeze(1))[:, 0]
    ended = torch.isin(last, model.ends).tolist()
    found = []
    for i, row in enumerate(answers.tokens.tolist()):
        length = int(answers.lengths[i])
        if (ended[i] or cut) and length > 4:
            found.append((i, tokenizer.decode(row[: length - ended[i]]).rstrip()))
    return found


def docstring_stub(text: str) -> str | None:
    """A function's head up to its docstring's end, out of an answer."""
    block = re.search(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    code = block.group(1) if block else text
    found = re.search(r"(?:(?:from|import) .*\n+)*def \w+\(.*?:\n\s+(\"\"\"|''').*?\1\n?", code, re.DOTALL)
    return found.group(0) if found and len(found.group(0)) < 1200 else None


def own_prompts(model: BatchLlama, tokenizer: Any, data: dict[str, Any], until: float) -> list[str]:
    """Prompts in the model's own hand: function heads, exercises, and user turns continued from the bare header.

    At the clock's `until` it goes on with what there is.
    """
    parts, batch, found = load_parts(data["seed"]), data["batch"], list[str]()

    def about() -> str:
        lists = ("functions", "topics", "classes", "concepts", "libraries", "cli")
        thing = parts.one(parts.draw.choice(lists))
        thing = thing["task"] if isinstance(thing, dict) else str(thing).replace("|", ": ")
        return parts.pick(f" related to {thing}", f" about {thing}", f", for a program that deals with {thing}", "")

    header = render(tokenizer, "\u2603")
    header = header[: header.index(tokenizer.encode("\u2603", add_special_tokens=False)[0])]
    for kind, count, tokens in (
        ("stub", data["own_stubs"], 224), ("exercise", data["own_exercises"], 128), ("turn", data["own_turns"], 128),
    ):  # fmt: skip
        for start in range(0, count, batch):
            if time.perf_counter() > until:
                break
            size = min(batch, count - start)
            begun = [parts.one("beginnings") if kind == "turn" else "" for _ in range(size)]
            request = STUB_REQUEST if kind == "stub" else EXERCISE_REQUEST
            if kind == "turn":
                asked = [header + tokenizer.encode(text, add_special_tokens=False) for text in begun]
            else:
                asked = [render(tokenizer, request.format(about=about())) for _ in range(size)]
            texts = write_texts(model, tokenizer, asked, tokens, cut=kind == "stub")
            if kind == "stub":
                found += [wrapped_stub(stub, parts.draw) for _, text in texts if (stub := docstring_stub(text))]
            else:
                found += [(begun[i] + text).strip() for i, text in texts]
        say(f"{len(found)} prompts in the model's own hand")
    return [t for t in dict.fromkeys(found) if 12 <= len(t) < 2000 and "\ufffd" not in t]


class PartWriter:
    """Rows to disk, one file per batch, while the next batch is being decoded."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows = folder, 0
        self._pool, self._last = ThreadPoolExecutor(1), None
        self._number = len(list(folder.glob("part*.safetensors")))
        self._last: Future[None] | None

    def add(self, rows: TrainingRows) -> None:
        self.wait()
        self.rows += len(rows)
        self._last = self._pool.submit(self._save, rows, self.folder / f"part{self._number:04d}.safetensors")
        self._number += 1

    def _save(self, rows: TrainingRows, path: Path) -> None:
        kept = {"hidden": rows.hidden.cpu(), "tokens": rows.tokens.cpu(), "document": rows.document.cpu()}
        save_file(kept, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)

    def wait(self) -> None:
        if self._last is not None:
            self._last.result()


def batches(ids: list[list[int]], order: list[int], data: dict[str, Any]) -> list[list[int]]:
    """Groups of like length, so that little is padding; each macro-batch of the order is a fair sample of all."""
    groups = []
    size = data["batch"]
    for start in range(0, len(order), 4 * size):
        some = sorted(order[start : start + 4 * size], key=lambda i: len(ids[i]))
        while some:
            width = len(ids[some[-1]]) + data["max_tokens"]
            count = max(1, min(size, data["cache_tokens"] // width))
            groups.append(some[-count:])
            some = some[:-count]
    return groups


def write(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    started, data = time.perf_counter(), settings["data"]
    model = BatchLlama(args.model, args.device, torch.bfloat16)
    tokenizer = load_tokenizer(args.model)
    torch.manual_seed(data["seed"])
    lines = [json.loads(line) for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    prompts: list[Any] = [line.get("messages") or line["prompt"] for line in lines][: data["prompts"]]
    overlap = Overlap(held_out_texts([EIGHTY, *args.held_out_from]))
    with torch.no_grad():
        own = own_prompts(model, tokenizer, data, started + data["own_share"] * args.seconds)
    reasons = [overlap.why(text) for text in own]
    prompts += [text for text, why in zip(own, reasons, strict=True) if why is None]
    dropped = {why: reasons.count(why) for why in set(reasons) - {None}}
    random.Random(data["seed"]).shuffle(prompts)
    ids = [render(tokenizer, prompt) for prompt in prompts]
    order = [i for i, tokens in enumerate(ids) if len(tokens) <= data["max_prompt_tokens"]]
    say(f"{len(order)} prompts, {len(own)} of the model's own, of which dropped as near {dropped}")
    writer, answered = PartWriter(args.work / "rows"), 0
    log = (args.work / "answers.jsonl").open("a", encoding="utf-8")
    for heat, share in ((0.0, 1.0), (data["temperature"], data["sampled"])):
        groups = batches(ids, order[: round(share * len(order))], data)[::-1]
        while groups:
            group = groups.pop()
            spent = time.perf_counter() - started
            if writer.rows and (spent > args.seconds or writer.rows > data["max_rows"]):
                break
            try:
                answers = model.generate([ids[i] for i in group], data["max_tokens"], heat)
            except torch.OutOfMemoryError:
                say(f"not enough memory for {len(group)} answers at once: halves")
                torch.cuda.empty_cache()
                half = len(group) // 2
                groups += [group[half:], group[:half]] if half else []
                continue
            rows = flatten(answers, 0)
            writer.add(rows)
            answered += len(group)
            for i, row, length in zip(group, answers.tokens.tolist(), answers.lengths.tolist(), strict=True):
                log.write(
                    json.dumps({"prompt": text_of(prompts[i]), "temperature": heat, "answer": row[:length]}) + "\n"
                )
            del answers, rows
            spent = time.perf_counter() - started
            say(f"temperature {heat}: {answered} answers, {writer.rows} tokens, {spent:.0f} s")
    writer.wait()
    log.close()
    facts = {"prompts": len(order), "own": len(own), "near_held_out": dropped, "answers": answered}
    facts |= {"answer_tokens": writer.rows, "seconds": round(time.perf_counter() - started, 1)}
    (args.work / "written.json").write_text(json.dumps(facts))
    return facts


def load_rows(folder: Path, device: str) -> TrainingRows:
    """The parts, on the device, as many as fill at most two thirds of it; documents are numbered through."""
    paths, counts, width = list[Path](), list[int](), 0
    space = torch.cuda.mem_get_info()[0] // 3 * 2 if device.startswith("cuda") else 1 << 40
    for path in sorted(folder.glob("part*.safetensors")):
        with safe_open(path, framework="pt") as file:
            count = file.get_slice("tokens").get_shape()[0]
            width = file.get_slice("hidden").get_shape()[1]
        if (sum(counts) + count) * (2 * width + 8) > space:
            say(f"{path.name} and what follows does not fit")
            break
        paths.append(path)
        counts.append(count)
    hidden = torch.empty(sum(counts), width, dtype=torch.bfloat16, device=device)
    tokens = torch.empty(sum(counts), dtype=torch.int32, device=device)
    document, at, first = torch.empty_like(tokens), 0, 0
    for path, count in zip(paths, counts, strict=True):
        part, place = load_file(path), slice(at, at + count)
        hidden[place], tokens[place] = part["hidden"].to(device), part["tokens"].to(device)
        document[place] = part["document"].to(device) + first
        at, first = at + count, first + int(part["document"][-1]) + 1
    return TrainingRows(hidden, tokens, document)


def base_tensors(folder: Path, vocab: torch.Tensor, device: str) -> BaseTensors:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        matrix = file.get_tensor("model.embed_tokens.weight").to(device, torch.bfloat16)
    return BaseTensors(matrix, matrix, vocab.to(device).long())


def train(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    started, device = time.perf_counter(), args.device
    rows = load_rows(args.work / "rows", device)
    say(f"{len(rows)} rows loaded in {time.perf_counter() - started:.1f} s")
    identity, sizes = base_identity(args.model), settings["drafter"]
    vocab = frequent_tokens(rows.tokens, identity.vocab_size, settings["draft_vocab"])
    base = base_tensors(args.model, vocab[: settings["loss_vocab"]], device)
    config = DrafterConfig(identity.vocab_size, identity.hidden_size, sizes["exit_dim"], sizes["num_layers"], rnn=True)
    spec = DrafterSpec(config, HeadKind(sizes["head"]), sizes["draft_len"])
    sample = torch.arange(0, len(rows), max(1, len(rows) // 65536), device=device)
    scales = InputScales.measure(rows.hidden[sample], base.embedding[rows.tokens[sample].long()])
    options = fit_options(settings, str(base.head.device.type))
    model = TrainableDrafter(spec, seed=options.seed, scales=scales).to(device)
    trainer = Trainer(model, rows, base, options)
    log = args.work / "training_log.jsonl"
    log.unlink(missing_ok=True)

    def note(line: StepLog) -> None:
        say(json.dumps(line.as_dict()))
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line.as_dict()) + "\n")

    def export(output: Path, **more: Any) -> dict[str, Any]:
        facts = {"rows": len(rows), "steps": trainer.step, "rows_per_step": options.windows * options.window}
        facts |= {"rows_seen": trainer.step * facts["rows_per_step"], "seconds": round(time.perf_counter() - begun, 1)}
        facts |= {"parameters": sum(p.numel() for p in model.parameters()), **more}
        written = args.work / "written.json"
        data = json.loads(written.read_text()) if written.exists() else {}
        provenance = {"script": "scripts/train_code_drafter.py", "settings": settings, "torch": torch.__version__}
        provenance["device"] = torch.cuda.get_device_name() if base.head.is_cuda else "CPU"
        write_drafter(
            output, model, identity, dtype=torch.bfloat16, provenance=provenance,
            metrics={"data": data, "training": facts}, draft_vocab=vocab, overwrite=True,
        )  # fmt: skip
        return facts

    begun = time.perf_counter()
    first, last = settings["calibration"]
    trainer.run(note, no_progress, until=first)  # compiles
    synchronize(base.head)
    timed = time.perf_counter()
    trainer.run(note, no_progress, until=last)
    synchronize(base.head)
    per_step = (time.perf_counter() - timed) / (last - first)
    left = args.seconds - (time.perf_counter() - started)
    steps = min(options.max_steps, last + max(1, int(0.97 * left / per_step)))
    trainer.options = replace(options, max_steps=steps)
    seen = steps * options.windows * options.window
    say(f"{1e3 * per_step:.1f} ms a step, {left:.0f} s left: {steps} steps, {seen} rows")
    while trainer.step < steps:
        trainer.run(note, no_progress, until=trainer.step + settings["save_every"])
        if time.perf_counter() - started > 1.1 * args.seconds:
            say("out of time")
            break
        if trainer.step < steps:
            export(args.work / "drafter-so-far", unfinished=True)
    return export(args.output, unfinished=trainer.step < steps, milliseconds_per_step=round(1e3 * per_step, 2))


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def measure(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    chosen = settings["measure"]
    tokenizer, found = load_tokenizer(args.model), dict[str, Any]()
    shapes = parse_grid(args.grid or chosen["grid"])
    longest = max(shape.draft_len for shape in shapes)
    model = BatchLlama(args.model, args.device, torch.bfloat16)
    drafters = {folder: read_drafter(folder, longest).to(args.device, torch.bfloat16) for folder in args.drafter}
    recorded = {}
    for path in args.held_out:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][: chosen["prompts"]]
        ids = [render(tokenizer, line.get("messages") or line["prompt"]) for line in lines]
        rows = flatten(model.generate(ids, chosen["max_tokens"], 0.0), 0)
        recorded[path.stem] = rows, [line.get("category", "") for line in lines]
        say(f"{path.stem}: {len(ids)} prompts, {len(rows)} tokens")
    base = BaseTensors(model.embedding, model.embedding, torch.arange(model.embedding.shape[0], device=args.device))
    del model
    for folder, drafter in drafters.items():
        vocab = draft_vocab(folder)
        grid = [s for s in shapes if s.draft_len <= drafter.spec.draft_len]
        for name, (rows, categories) in recorded.items():
            for count in (0, *chosen["vocabularies"]):
                head = borrowed_head(drafter, base.head, vocab[:count] if count and vocab is not None else None)
                few = grid if count == 0 else [s for s in grid if s.draft_len == max(g.draft_len for g in grid)]
                results = evaluate_grid(
                    drafter, base, rows, few, head=head, batch=chosen["batch"], categories=categories,
                    progress=no_progress,
                )  # fmt: skip
                key = f"{folder.name}/{name}/{count or 'whole'}"
                found[key] = {"acceptance": [r.as_dict() for r in results]}
                say(
                    key
                    + " "
                    + " ".join(f"{r.shape.num_beams}x{r.shape.draft_len}={r.acceptance_length:.3f}" for r in results)
                )
                args.report.write_text(json.dumps(found))
            accuracy = token_accuracy(
                drafter, base, rows, head=borrowed_head(drafter, base.head), batch=chosen["batch"]
            )
            found[f"{folder.name}/{name}/whole"]["accuracy"] = accuracy
            say(f"{folder.name}/{name} top1 " + " ".join(f"{a['top1']:.3f}" for a in accuracy))
            args.report.write_text(json.dumps(found))
    return {"report": str(args.report)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("phase", choices=("write", "train", "measure"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--settings", type=Path, default=SETTINGS)
    parser.add_argument("--set", action="append", default=[], help="section.name=JSON, over the settings file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--held-out-from", type=Path, action="append", default=[])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--drafter", type=Path, action="append", default=[])
    parser.add_argument("--held-out", type=Path, action="append", default=[])
    parser.add_argument("--grid")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    settings = json.loads(args.settings.read_text(encoding="utf-8"))
    for item in args.set:
        path, _, value = item.partition("=")
        *sections, name = path.split(".")
        place = settings
        for section in sections:
            place = place[section]
        place[name] = json.loads(value)
    args.work.mkdir(parents=True, exist_ok=True)
    facts = {"write": write, "train": train, "measure": measure}[args.phase](args, settings)
    say(f"{args.phase} done {json.dumps(facts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
