"""One file of prompts serves every command, whatever it was written by; streams, devices, numbers beyond reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.tiny import VOCAB, Program, write_models
from tests.prompts.test_chat_template import QWEN
from trtllm_redrafter import load_engine
from trtllm_redrafter.run import api

SEPARATORS = "one\u2028two\x85three\x0cfour"
PARTS = [{"type": "text", "text": "hello "}, {"type": "text", "text": "world"}]
PLAN = ("--plan", "--json", "--max-steps", 2)


def write(path: Path, *rows: object, ascii_only: bool = False) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, drafter and engine; the same without a chat template below `plain`; a recipe for each."""
    path = tmp_path_factory.mktemp("small")
    for folder in (path, path / "plain"):
        base, drafter = write_models(folder)
        if folder != path:
            (base / "chat_template.jinja").unlink(missing_ok=True)
            settings = json.loads((base / "tokenizer_config.json").read_text())
            settings.pop("chat_template", None)
            (base / "tokenizer_config.json").write_text(json.dumps(settings))
        api.convert(base, folder / "checkpoint", drafter=drafter, num_beams=2)
        api.build(folder / "checkpoint", folder / "engine", max_seq_len=128, max_batch_size=2)
        recipe = f"base: {base}\ndrafter: {drafter}\nengine: {folder}/engine\n"
        (folder / "r.yaml").write_text(recipe)
    return path


def with_template(small: Path, work: Path, template: str) -> Path:
    """The engine, built with another chat template."""
    base = shutil.copytree(small / "base", work / "base")
    (base / "chat_template.jinja").write_text(template)
    return api.build(small / "checkpoint", work / "engine", tokenizer=base, max_seq_len=128, max_batch_size=2)


def commands(folder: Path, file: Path, work: Path) -> dict[str, list[object]]:
    """The four commands that read prompts, and training, on one file."""
    base, drafter = folder / "base", folder / "drafter"
    return {
        "run": ["run", "--engine", folder / "engine", "--input", file, "--max-tokens", 4, "--json"],
        "evaluate": ["evaluate", "--base", base, "--drafter", drafter, "--prompts", file, "--grid", "1x2",
                     "--max-tokens", 4, "--json"],
        "bench": ["bench", folder / "engine", "--prompts", file, "--max-tokens", 4, "--batch", "1", "--json"],
        "tune": ["tune", folder / "r.yaml", "--prompts", file, "--max-tokens", 4, "--batch", "1", "--grid", "1x2",
                 "--set", "tune.steps=2", "--json"],
        "train": ["train", "--base", base, "--prompts", file, "--output", work / "out", "--work-dir", work / "w",
                  *PLAN],
    }  # fmt: skip


@pytest.fixture(params=["chat", "plain"])
def folder(small: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    yield small if request.param == "chat" else small / "plain"


def test_one_file_for_all_commands(program: Program, folder: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path / "p.jsonl",
        {"prompt": SEPARATORS, "category": "x", "id": "first", "max_tokens": 3, "temprature": 1},
        {"prompt": "plain", "chat": False, "draft": True, "score": float("nan")},
    )
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    for name, command in commands(folder, file, tmp_path).items():
        assert program(*command) == 0, (name, program.err)
        assert "line 1: the key 'temprature' is not known" in program.err and "'temperature'" in program.err, name
        assert program.err.count("is not known") == 2, "`category` and what other commands read pass"
        section, key = {"run": ("summary", "prompts"), "evaluate": ("", "prompts"), "tune": ("", "texts"),
                        "bench": ("settings", "requests"), "train": ("plan", "texts")}[name]  # fmt: skip
        document = program.document
        assert (document[section] if section else document)[key] == 2, name


def test_conversations_in_every_form(program: Program, small: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path / "p.jsonl",
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": PARTS}]},
        {"conversations": [{"from": "human", "value": "hello world"}], "system": "s"},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "content": "1"}]},
    )  # fmt: skip
    for name, command in commands(small, file, tmp_path).items():
        assert program(*command) == 0, (name, program.err)
        if name == "run":
            first, second, _ = sorted(program.document["results"], key=lambda r: r["id"])
            assert first["prompt_tokens"] == second["prompt_tokens"] and first["text"] == second["text"]
    bad = write(tmp_path / "bad.jsonl", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})
    for name, command in commands(small, bad, tmp_path).items():
        assert program(*command) == 3 and "type 'image_url'" in program.err and "line 1" in program.err, name


def test_training_text_in_every_form(program: Program, small: Path, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    file = write(
        tmp_path / "t.jsonl",
        {"messages": [{"role": "user", "content": PARTS}, answer], "category": "x"},
        {"conversations": [{"from": "human", "value": SEPARATORS}, {"from": "gpt", "value": "hello"}]},
        {"text": SEPARATORS, "source": "web"},
    )
    train = [
        "train",
        "--base",
        small / "base",
        "--data",
        file,
        "--output",
        tmp_path / "o",
        "--work-dir",
        tmp_path / "w",
    ]
    assert program(*train, *PLAN) == 0, program.err
    assert program.document["plan"]["texts"] == 3 and "'source' is not known" in program.err
    train[2] = small / "plain" / "base"
    assert program(*train, *PLAN) == 3 and "no chat template" in program.err and "line 2" in program.err


def test_a_template_that_wraps_the_last_answer(program: Program, small: Path, tmp_path: Path) -> None:
    base = shutil.copytree(small / "base", tmp_path / "base")
    (base / "chat_template.jinja").write_text(QWEN)
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("abcd")]
    file = write(tmp_path / "t.jsonl", {"messages": turns[:2]}, {"messages": turns})
    train = ["train", "--base", base, "--data", file, "--output", tmp_path / "o", "--work-dir", tmp_path / "w", *PLAN]
    assert program(*train) == 0, program.err
    assert program.document["plan"]["texts"] == 3, "each answer as the model writes it"
    thinking = program.document["plan"]["rows"]
    assert program(*train, "--chat-template-kwargs", "enable_thinking=false") == 0
    assert program.document["plan"]["rows"] == thinking - 3 * len("<think>\n\n</think>\n\n")


def test_template_arguments_from_everywhere(program: Program, small: Path, tmp_path: Path) -> None:
    engine = with_template(small, tmp_path, "{{ mood }}{{ messages[-1].content }}")
    file = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "a", "chat_template_kwargs": {"mood": "1234"}})
    run = ["run", "--engine", engine, "--input", file, "--max-tokens", 1, "--json"]

    def sizes(*flags: object) -> list[int]:
        assert program(*run, *flags) == 0, program.err
        results = sorted(program.document["results"], key=lambda r: r["id"])
        return [r["prompt_tokens"] for r in results]

    assert sizes() == [1, 5]
    assert sizes("--chat-template-kwargs", "mood=12") == [3, 5]
    assert sizes("--chat-template-kwargs", 'mood="123"', "--chat-template-kwargs", "other=null") == [4, 5]
    with load_engine(engine) as loaded:
        [result] = loaded.generate(["a"], max_tokens=1, chat_template_kwargs={"mood": "!"})
        assert result.prompt_tokens == 2
    assert program(*run, "--chat-template-kwargs", "messages=[]") == 2 and "leave it out" in program.err
    assert program(*run, "--chat-template-kwargs", "mood") == 2 and "KEY=JSON" in program.err


def test_no_line_ends_the_batch(program: Program, small: Path, tmp_path: Path) -> None:
    huge = "1" + "0" * 400
    lines = [
        '{"prompt": "x", "temperature": %s}', '{"prompt": "x", "top_p": %s}', '{"prompt": "x", "top_k": %s}',
        '{"prompt": "x", "seed": %s}', '{"prompt": "x", "max_tokens": %s}', '{"prompt": "x", "stop_token_ids": [%s]}',
    ]  # fmt: skip
    values = (huge, "NaN", "Infinity", "1e999", "true", "-1", '"1"', "[]")
    bad = [line % value for line in lines for value in values]
    bad += [
        '{"prompt": "\\ud83d"}',
        '{"prompt": "x", "chat_template_kwargs": 5}',
        "[" * 9999,
        '{"a": ' + "1" * 5000 + "}",
    ]
    good = [{"prompt": "good", "id": "good-1"}, {"prompt": "good", "id": "good-2", "comment": "\ud83d"}]
    file = write(tmp_path / "p.jsonl", good[0], *bad, json.dumps(good[1]))
    output = tmp_path / "o.jsonl"
    code = program("run", "--engine", small / "engine", "--input", file, "--max-tokens", 2, "--output", output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert code in (3, 7) and "internal error" not in program.err
    assert {r["id"] for r in rows if "text" in r} == {"good-1", "good-2"}
    errors = [r["error"] for r in rows if "error" in r]
    assert len(errors) == len(bad) and all(error["kind"] in ("input", "request") for error in errors)
    assert all("stumbles" not in json.dumps(error) and "report it" not in json.dumps(error) for error in errors)


def test_streams_and_devices(program: Program, small: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for name, command in commands(small, pipe, tmp_path).items():
        if name in ("run", "evaluate", "train"):
            writer = threading.Thread(target=pipe.write_text, args=('{"prompt": "a"}\n{"prompt": "b"}\n',))
            writer.start()
            assert program(*command) == 0, (name, program.err)
            writer.join()
    for name, command in commands(small, Path("/dev/zero"), tmp_path).items():
        assert program(*command) == 3 and "a device" in program.err, name
    recipe = tmp_path / "r.yaml"
    recipe.write_text((small / "r.yaml").read_text() + f"work_dir: {tmp_path}/work\nrun: {{input: {pipe}}}\n")
    assert program("pipeline", recipe, "--dry-run") == 3 and "can be read once" in program.err


def test_standard_input_and_process_substitution(small: Path) -> None:
    script = (
        f'echo \'{{"prompt": "a"}}\' | {sys.executable} -m trtllm_redrafter run --engine "$0" --input /dev/stdin '
        "--max-tokens 2 --json && "
        f'{sys.executable} -m trtllm_redrafter run --engine "$0" --input <(echo \'{{"prompt": "a"}}\') '
        "--max-tokens 2 --json"
    )
    done = subprocess.run(["bash", "-c", script, small / "engine"], capture_output=True, check=True)
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert [d["summary"]["prompts"] for d in documents] == [1, 1]


def test_a_template_that_never_ends(
    program: Program, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtllm_redrafter.prompts.chat_template.MAX_SECONDS", 0.3)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    engine = with_template(small, tmp_path, loops)
    assert program("run", "--engine", engine, "--prompt", "x", "--max-tokens", 2) == 7
    assert "has not ended after" in program.err and "remedy" in program.err
    assert program("run", "--engine", engine, "--prompt", "x", "--max-tokens", 2, "--no-chat") == 0


def test_stops_by_flag_and_line(program: Program, small: Path, tmp_path: Path) -> None:
    run = ["run", "--engine", small / "engine", "--max-tokens", 20, "--json"]
    file = write(tmp_path / "p.jsonl", {"prompt": "a", "ignore_eos": True})
    assert program(*run, "--input", file) == 0
    tokens = program.document["results"][0]["token_ids"]
    stop, place = tokens[10], tokens.index(tokens[10])
    assert program(*run, "--input", file, "--stop-token-id", stop) == 0
    result = program.document["results"][0]
    assert result["token_ids"] == tokens[: place + 1] and result["stop_reason"] == stop
    lines = write(
        tmp_path / "s.jsonl",
        {"prompt": "a", "ignore_eos": True, "stop_token_ids": [stop], "skip_special_tokens": False},
        {"prompt": "a", "stop_token_ids": [VOCAB]},
        {"prompt": "a", "skip_special_tokens": 1},
    )
    assert program(*run, "--input", lines) in (3, 7)
    found = {r["id"]: r for r in program.document["results"]}
    assert found["line-1"]["stop_reason"] == stop
    assert "outside the vocabulary" in found["line-2"]["error"]["what"]
    assert "`skip_special_tokens` is 1" in found["line-3"]["error"]["what"]
    with load_engine(small / "engine") as engine:
        [stopped] = engine.generate(["a"], max_tokens=20, ignore_eos=True, stop_token_ids=[stop])
        assert stopped.stop_reason == stop
