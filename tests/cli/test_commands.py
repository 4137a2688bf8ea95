"""Each command on tiny models: what it prints, what it writes, its JSON document and its exit code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cli.tiny import Program
from trtllm_redrafter.cli import app
from trtllm_redrafter.cli.options import flag
from trtllm_redrafter.settings.schema import RunSection, keys

COMMANDS = (
    "convert",
    "build",
    "run",
    "chat",
    "pipeline",
    "inspect",
    "verify",
    "plan",
    "doctor",
    "train",
    "evaluate",
    "bench",
    "tune",
)


def help_of(*command: str) -> str:
    """On a terminal of 80 columns."""
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*command, "--help"])
    assert result.exit_code == 0 and all(len(line) <= 80 for line in result.output.splitlines())
    return result.output


def test_help_of_everything() -> None:
    text = help_of()
    assert all(f"\n  {command} " in text for command in COMMANDS)
    for command in COMMANDS:
        text = help_of(command)
        assert ("--json" in text) is (command != "chat") and "…" not in text  # no name is cut off


def test_flags_are_declared_by_the_schema() -> None:
    text = " ".join(help_of("run").split())
    for key, field in RunSection.model_fields.items():
        assert f"run.{key}" in keys() and " ".join(str(field.description).split()) in text, key
    for part in ("--top-k <int>", "--api executor|llm", "--draft / --no-draft", "--stop-token-id <list[int]>",
                 "--max-tokens <int> tokens to write per prompt (default: 128)",
                 "--engine <path> engine directory (required)", "--chat-template-kwargs KEY=JSON"):  # fmt: skip
        assert part in text, part


def test_a_switch_is_named_as_it_was_given() -> None:
    for row, value, name in (
        (flag("run.chat"), True, "--chat"),
        (flag("run.chat"), False, "--no-chat"),
        (flag("convert.greedy", "--greedy/--sampling"), False, "--sampling"),
        (flag("run.top_k"), 0, "--top-k"),
    ):
        assert row.given(value) == (name, value)
    assert flag("run.stop").given([]) == ("--stop", None)
    assert flag("chat_template_kwargs").given(["thinking=false"])[1] == {"thinking": False}


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from trtllm_redrafter.cli import run_app; code = run_app(['run', '--help']); "
        "bad = {'torch', 'transformers'} & set(sys.modules); assert not bad, bad; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(program: Program) -> None:
    assert program("--version") == 0 and program.out.startswith("trtllm-redrafter ")


def test_convert_and_build(program: Program, models: Path, tmp_path: Path) -> None:
    flags = ["--base", models / "base", "--drafter", models / "drafter", "--output", tmp_path / "checkpoint"]
    assert program("convert", *flags, "--num-beams", 4, "--dry-run", "--json") == 0
    assert "convert.num_beams" in program.out and "flag --num-beams" in program.out and "reads" in program.out
    assert program.document["dry_run"] and not (tmp_path / "checkpoint").exists()
    assert program("convert", *flags, "--num-beams", 4, "--json") == 0
    document = program.document
    assert document["ok"] and document["plan"]["config"]["redrafter_num_beams"] == 4
    assert document["values"]["convert.num_beams"] == {"value": 4, "origin": "flag --num-beams"}
    assert (tmp_path / "checkpoint" / "manifest.json").exists()

    flags = ["--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "engine", "--max-batch-size", 3]
    assert program("build", *flags, "--dry-run") == 0
    assert "derived from the model's 256 positions" in program.out and not (tmp_path / "engine").exists()
    assert program("build", *flags, "--json") == 0
    assert program.document["plan"]["max_batch_size"] == 3 and program.document["plan"]["max_seq_len"] == 256
    assert program("build", *flags) == 5 and "the output exists already" in program.err
    assert program("build", *flags, "--overwrite") == 0


def test_run_prints_texts_in_order_and_a_table(program: Program, artefacts: Path) -> None:
    flags = ["run", "--engine", artefacts / "engine", "--max-tokens", 6]
    assert program(*flags, "--prompt", "one", "--prompt", "two", "--prompt", "three", "--stats") == 0
    assert [line for line in program.out.splitlines() if line.startswith("---")] == [
        "--- prompt-1",
        "--- prompt-2",
        "--- prompt-3",
    ]
    for word in ("tokens per step", "drafted", "by position", "tokens/s", "2 beams x 3"):
        assert word in program.out
    assert program(*flags, "--prompt", "one", "--no-draft", "--stats") == 0
    assert "drafts" in program.out and "none" in program.out and "by position" not in program.out


def results(program: Program, artefacts: Path, *flags: object) -> list[dict[str, object]]:
    code = program("run", "--engine", artefacts / "engine", "--max-tokens", 12, "--json", *flags)
    assert code == 0, program.err
    found: list[dict[str, object]] = program.document["results"]
    return found


def test_drafting_changes_speed_and_never_the_tokens(program: Program, artefacts: Path) -> None:
    prompts = ["--prompt", "one", "--prompt", "a longer second prompt"]
    for sampling in ([], ["--temperature", 0.9, "--top-k", 40, "--top-p", 0.95, "--seed", 5]):
        drafted = results(program, artefacts, *prompts, *sampling)
        other = results(program, artefacts, *prompts, *sampling, "--num-beams", 5, "--draft-len", 2)
        plain = results(program, artefacts, *prompts, *sampling, "--no-draft")
        tokens = [
            [r["token_ids"] for r in sorted(found, key=lambda r: str(r["id"]))] for found in (drafted, other, plain)
        ]
        assert tokens[0] == tokens[1] == tokens[2]
    assert plain[0]["drafted_tokens"] == 0 and drafted[0]["drafted_tokens"] != 0


def test_a_seed_fixes_the_text_and_no_seed_does_not(program: Program, artefacts: Path) -> None:
    hot = ["--prompt", "one", "--temperature", 2.0]
    seeded = [results(program, artefacts, *hot, "--seed", 1)[0]["token_ids"] for _ in range(2)]
    assert seeded[0] == seeded[1]
    free = [tuple(results(program, artefacts, *hot)[0]["token_ids"]) for _ in range(3)]  # type: ignore[arg-type]
    assert len(set(free)) > 1


def test_chat_and_plain_prompts_differ(program: Program, artefacts: Path) -> None:
    chat = results(program, artefacts, "--prompt", "one")[0]
    plain = results(program, artefacts, "--prompt", "one", "--no-chat")[0]
    assert plain["prompt_tokens"] == 3 and chat["prompt_tokens"] != 3


def test_streaming_shows_the_same_text(program: Program, artefacts: Path) -> None:
    flags = ["run", "--engine", artefacts / "engine", "--max-tokens", 12, "--prompt", "one", "--prompt", "two"]
    assert program(*flags, "--no-stream") == 0
    texts = "\n".join(line for line in program.out.split("\n") if not line.startswith("---"))
    assert program(*flags, "--stream") == 0
    assert program.out == texts


def test_stop_strings(program: Program, artefacts: Path) -> None:
    text = str(results(program, artefacts, "--prompt", "one")[0]["text"])
    stopped = results(program, artefacts, "--prompt", "one", "--stop", text[3:5], "--stop", "never seen")[0]
    assert stopped["text"] == text[: text.index(text[3:5])]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", text[3:5])


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_jsonl_in_and_out(program: Program, artefacts: Path, tmp_path: Path) -> None:
    lines = write_lines(
        tmp_path / "in.jsonl",
        {"prompt": "one", "id": "first"},
        "",
        {"messages": [{"role": "user", "content": "one"}], "max_tokens": 3},
        {"prompt": "one", "draft": False, "chat": False, "temperature": 0.5, "seed": 3, "stop": "zzz"},
    )
    flags = ["run", "--engine", artefacts / "engine", "--input", lines, "--max-tokens", 5]
    assert program(*flags, "--output", tmp_path / "out" / "out.jsonl", "--json") == 0
    assert program.document["results"] is None and program.document["summary"]["prompts"] == 3
    found = {r["id"]: r for r in map(json.loads, (tmp_path / "out" / "out.jsonl").read_text().splitlines())}
    assert set(found) == {"first", "line-3", "line-4"}
    assert len(found["first"]["token_ids"]) == 5 and len(found["line-3"]["token_ids"]) == 3
    assert found["line-3"]["source"] == f"{lines}, line 3" and found["line-4"]["drafted_tokens"] == 0
    assert found["first"]["token_ids"][:3] == found["line-3"]["token_ids"]
    assert program(*flags, "--output", tmp_path / "out" / "out.jsonl") == 5
    assert "the output exists already" in program.err and "--overwrite" in program.err
    assert program(*flags, "--output", tmp_path / "out" / "out.jsonl", "--overwrite") == 0


def test_bad_lines_are_named_and_the_others_run(program: Program, artefacts: Path, tmp_path: Path) -> None:
    lines = write_lines(
        tmp_path / "in.jsonl",
        '{"prompt": "one"',
        {"prompt": "one"},
        ["prompt"],
        {"promt": "one"},
        {"prompt": "one", "messages": []},
        {"prompt": 1},
        {"messages": [{"role": "user"}]},
        {"prompt": "one", "max_tokens": "5"},
        {"prompt": "one", "stop": [1]},
        {"prompt": "one", "draft": 1},
        {"messages": [{"role": "user", "content": "x"}], "chat": False},
        {"prompt": "one", "temperature": -1},
        {"prompt": "x" * 200},
        {"prompt": "two", "id": None},
        '{"prompt": "\\ud800"}',
        {"prompt": "one", "top_k": 2**70},
    )
    output = tmp_path / "out.jsonl"
    code = program("run", "--engine", artefacts / "engine", "--input", lines, "--max-tokens", 4, "--output", output)
    assert code == 3 and "2 results written" in program.out and "14 failed" in program.out
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert {r["id"] for r in found if "text" in r} == {"line-2", "line-14"}
    said = {r["id"]: r["error"] for r in found if "error" in r}
    expected = {
        "line-1": "not JSON", "line-3": "not a JSON object", "line-4": "unknown key 'promt'",
        "line-5": "exactly one of `prompt`, `messages`", "line-6": "not a string", "line-7": "`content` is missing",
        "line-8": "`max_tokens` is '5'", "line-9": "`stop`", "line-10": "`draft` is 1",
        "line-11": "without the chat template", "line-12": "temperature is -1", "line-13": "tokens",
        "line-15": "half a surrogate pair", "line-16": "top_k is 1180591620717411303424",
    }  # fmt: skip
    assert set(said) == set(expected)
    for job, text in expected.items():
        assert text in json.dumps(said[job]), said[job]
        assert f"line {job[5:]}" in said[job]["where"] and "remedy" in json.dumps(said[job])
        assert f"{lines}, line {job[5:]}" in program.err


def test_an_engine_without_drafter(program: Program, artefacts: Path) -> None:
    flags = ["run", "--engine", artefacts / "plain", "--prompt", "one", "--max-tokens", 5]
    assert program(*flags, "--json") == 0 and program.document["summary"]["drafted_tokens"] == 0
    assert program(*flags, "--num-beams", 2) == 2 and "no drafter" in program.err


def test_inspect_all_kinds(program: Program, models: Path, artefacts: Path) -> None:
    for path, kind in (
        (models / "base", "Hugging Face model"),
        (models / "drafter", "drafter"),
        (artefacts / "checkpoint", "TensorRT-LLM checkpoint with drafter"),
        (artefacts / "engine", "engine of the torch backend"),
    ):
        assert program("inspect", path, "--json") == 0
        assert program.document["kind"] == kind and program.document["tensors"]


def test_verify_whole_and_broken(program: Program, models: Path, artefacts: Path, tmp_path: Path) -> None:
    assert program("verify", artefacts / "checkpoint", "--against", models / "base", "--json") == 0
    assert program.document["ok"] and any("bit for bit" in check for check in program.document["checks"])
    assert f"{4 * 32} greedy tokens after 4 prompts are the base model's" in program.document["checks"]
    assert program("verify", artefacts / "engine") == 0 and "all checks passed" in program.out
    broken = tmp_path / "checkpoint"
    broken.mkdir()
    for file in (artefacts / "checkpoint").rglob("*"):
        if file.is_file():
            target = broken / file.relative_to(artefacts / "checkpoint")
            target.parent.mkdir(exist_ok=True)
            data = bytearray(file.read_bytes())
            data[-1] ^= file.name == "rank0.safetensors"
            target.write_bytes(data)
    assert program("verify", broken, "--json") == 8
    assert not program.document["ok"] and "content has changed" in program.err


RECIPE = """
base: {models}/base
drafter: {models}/drafter
convert: {{num_beams: 2}}
build: {{max_seq_len: 128}}
run: {{prompts: [one, two], max_tokens: 6, output: results.jsonl}}
"""


def test_pipeline_then_run_in_a_process_of_its_own(models: Path, tmp_path: Path) -> None:
    """The whole way, as a user goes it: recipe, pipeline twice, then `run` on the engine it made."""
    (tmp_path / "demo.yaml").write_text(RECIPE.format(models=models))

    def call(*arguments: str) -> dict[str, object]:
        program = [sys.executable, "-m", "trtllm_redrafter", *arguments, "--json"]
        done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        document: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return document

    first = call("pipeline", "demo.yaml")
    assert [s["status"] for s in first["stages"]] == ["miss", "miss", "miss"]  # type: ignore[attr-defined]
    texts = [json.loads(line)["text"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(texts) == 2
    second = call("pipeline", "demo.yaml")
    assert [s["status"] for s in second["stages"]] == ["hit", "hit", "hit"] and second["run"] is None  # type: ignore[attr-defined]
    again = call("run", "--engine", "runs/demo/engine", "--prompt", "one", "--max-tokens", "6")
    assert again["results"][0]["text"] in texts  # type: ignore[index]


def test_pipeline_shows_its_plan(
    program: Program, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(RECIPE.format(models=models))
    assert program("pipeline", "demo.yaml", "--set", "convert.num_beams=3", "--dry-run", "--json") == 0
    assert program.document["values"]["convert.num_beams"] == {"value": 3, "origin": "flag --set"}
    assert program.document["values"]["base"]["origin"] == "file demo.yaml"
    assert program.document["values"]["run.max_tokens"]["value"] == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.yaml"]
    assert program("pipeline", "demo.yaml", "--set", "run.output=null") == 0
    assert "--- prompt-2" in program.out and "convert  miss" in program.err
    assert program("pipeline", "demo.yaml", "--set", "run.output=null") == 0
    assert "convert  hit" in program.err and "--- prompt-2" in program.out


def test_pipeline_with_a_failing_prompt_says_so_and_tries_again(
    program: Program, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text(RECIPE.format(models=models))
    Path("in.jsonl").write_text('{"prompt": "one"}\nnot json\n')
    for _ in range(2):
        assert program("pipeline", "demo.yaml", "--set", "run.input=in.jsonl", "--set", "run.prompts=[]") == 3
        assert "in.jsonl, line 2" in program.err
        Path("results.jsonl").unlink()


def test_base_has_the_name_that_other_tools_use(program: Program, models: Path, tmp_path: Path) -> None:
    arguments = ("--drafter", models / "drafter", "--output", tmp_path / "out", "--dry-run", "--json")
    documents = []
    for name in ("--base", "--model"):
        assert program("convert", name, models / "base", *arguments) == 0
        documents.append(program.document)
    assert documents[0] == documents[1]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [(b"two\nlines\n", 0, ""), (b"\xff\xfe", 3, "the prompt is no text"), (b"a" * (17 << 20), 3, "is too long")],
)
def test_a_prompt_from_standard_input(
    program: Program, artefacts: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, code: int, message: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    given = ("run", "--engine", artefacts / "engine", "--max-tokens", 4, "--json", "--prompt", "-")
    assert program(*given) == code and message in program.err
    if code == 0:
        (found,) = program.document["results"]
        assert program("run", *given[1:-1], text.decode().rstrip("\n")) == 0
        assert found["token_ids"] == program.document["results"][0]["token_ids"]


def test_standard_input_is_read_once(program: Program, artefacts: Path) -> None:
    assert program("run", "--engine", artefacts / "engine", "--prompt", "-", "--prompt", "-") == 2
    assert "standard input is asked for twice" in program.err
