"""Docker, compose and CI files, parsed and held against the program and the documented interfaces."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.main import get_command

from trtllm_redrafter.backends.tensorrt_llm.versions import CONTAINER
from trtllm_redrafter.checkpoint.names import TOKENIZER_DIRECTORY
from trtllm_redrafter.cli import app
from trtllm_redrafter.errors import InputError, UsageError, VerificationError
from trtllm_redrafter.settings.schema import keys

ROOT = Path(__file__).parent.parent
CONTRACT = json.loads((ROOT / "tests" / "data" / "trtllm" / "trtllm_api.json").read_text())
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
NVIDIA_ENTRY_POINT = "/opt/nvidia/nvidia_entrypoint.sh"
"""Of the base image; replacing it would lose CUDA's forward compatibility."""

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def ci_engines() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_engines", ROOT / "scripts" / "ci_engines.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ci_engines"] = module
    spec.loader.exec_module(module)
    return module


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments), comments and continuation lines resolved."""
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    return [(line.split()[0], line.split(None, 1)[1].strip()) for line in joined.splitlines() if line.strip()]


def check_command(words: list[str]) -> None:
    """Is `trtllm-redrafter WORDS` something the program takes? Options, recipe keys after --set."""
    command = COMMANDS[words[0]]
    options = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    for at, word in enumerate(words):
        if word.startswith("--"):
            assert word in options, f"{words[0]} has no option {word}"
        if word == "--set":
            assert words[at + 1].partition("=")[0] in keys(), words[at + 1]


def test_dockerfile_of_the_tensorrt_backend() -> None:
    """Both images install extras that exist, do not run as root, and start with a command of the program."""
    found = instructions((ROOT / "docker" / "tensorrt.Dockerfile").read_text())
    assert [args.split()[-1] for name, args in found if name == "FROM"] == ["rtx", "datacentre"]
    assert [args for name, args in found if name == "USER"] == ["10001", "10001"]
    for args in [args for name, args in found if name == "CMD"]:
        check_command(json.loads(args))
    for args in [args for name, args in found if name == "ENTRYPOINT"]:
        assert json.loads(args)[-1] == "trtllm-redrafter"
    extras = re.findall(r"'\.\[(.+?)\]'", " ".join(args for name, args in found if name == "RUN"))
    project = (ROOT / "pyproject.toml").read_text()
    assert extras and all(f"{extra} = [" in project for extra in ",".join(extras).split(","))


def test_dockerfile() -> None:
    found = instructions((ROOT / "docker" / "Dockerfile").read_text())
    assert ("ARG", f"TRTLLM_IMAGE={CONTAINER}") in found and ("ARG", 'TRTLLM_DIGEST=""') in found
    assert next(args for name, args in found if name == "FROM") == "${TRTLLM_IMAGE}${TRTLLM_DIGEST} AS base"
    stages: dict[str, list[tuple[str, str]]] = {}
    for name, args in found:
        if name == "FROM":
            stages[args.split()[-1]] = []
        elif stages:
            stages[list(stages)[-1]].append((name, args))
    assert set(stages) == {"base", "build", "serve"}
    for stage in ("build", "serve"):
        last_user = [args for name, args in stages[stage] if name == "USER"][-1]
        assert last_user == "10001", "never root, and a number, which a host can check without the image's passwd"
        order = [name for name, _ in stages[stage]]
        assert "RUN" not in order[order.index("USER") :]
        check_command(json.loads(dict(stages[stage])["CMD"]))
    entry_points = [args for stage in stages.values() for name, args in stage if name == "ENTRYPOINT"]
    assert [json.loads(args) for args in entry_points] == [[NVIDIA_ENTRY_POINT, "trtllm-redrafter"]]
    assert any("useradd --create-home --uid 10001 " in args for name, args in stages["base"] if name == "RUN")
    for name, args in found:
        assert name not in ("ADD",) and "sudo" not in args and "--break-system" not in args
        if name in ("ARG", "ENV"):
            assert not re.search(r"(?i)token|secret|password|api_key", args)
        if name == "RUN" and "pip install" in args:
            assert "--constraint" in args, "another torch or numpy would break TensorRT-LLM"
        if name == "COPY":
            for source in args.split()[:-1]:
                assert (ROOT / source).exists() and _sent_to_docker(source), source


def _sent_to_docker(source: str) -> bool:
    return f"!{source}" in (ROOT / ".dockerignore").read_text().splitlines()


def test_compose() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    assert set(compose["services"]) == {"doctor", "build", "serve"}
    for name, service in compose["services"].items():
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["image"].endswith(service["build"]["target"])
        device = service["deploy"]["resources"]["reservations"]["devices"][0]
        assert device["capabilities"] == ["gpu"] and service["init"] is True
        mounts = {v["target"]: v for v in service["volumes"]}
        assert "/engines" in mounts and mounts["/workspace/models"]["read_only"] is True
        for mount in mounts.values():
            assert mount["type"] == "volume" or mount["bind"] == {"create_host_path": False}, (
                "root's, if Docker makes it"
            )
        caches = [path for path, mount in mounts.items() if mount["type"] == "volume"]
        assert caches and all(path in DOCKERFILE for path in caches), "a volume takes its owner from the image"
        assert "environment" not in service and "env_file" not in service
        if name != "serve":
            check_command([re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in service["command"]])
    recipe = compose["services"]["build"]["command"][1]
    assert (ROOT / "configs" / (re.findall(r":-([^}]*)\}", recipe)[0] + ".yaml")).is_file()
    documented = {p.partition("=")[0] for p in CONTRACT["trtllm-serve serve CLI (relevant)"]}
    serve = compose["services"]["serve"]
    assert serve["entrypoint"] == [NVIDIA_ENTRY_POINT, "trtllm-serve", "serve"]
    tokenizer = serve["command"][serve["command"].index("--tokenizer") + 1]
    assert tokenizer == f"{serve['command'][0]}/{TOKENIZER_DIRECTORY}", "where `build` puts the base's config.json"
    assert {word for word in serve["command"] if word.startswith("--")} <= documented
    assert serve["command"][serve["command"].index("--backend") + 1] == "tensorrt", "its default is another engine"
    more = serve["command"][serve["command"].index("--extra_llm_api_options") + 1]
    assert f"COPY docker/{Path(more).name} {Path(more).parent}/" in DOCKERFILE
    served = yaml.safe_load((ROOT / "docker" / Path(more).name).read_text())
    assert served["kv_cache_config"]["enable_block_reuse"] is False, "the LLM API's default shares blocks"
    assert "/health" in serve["healthcheck"]["test"][-1] and "8000" in serve["healthcheck"]["test"][-1]
    compile(serve["healthcheck"]["test"][-1], "healthcheck", "exec")


def workflow() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    return found


def test_workflow() -> None:
    jobs = workflow()["jobs"]
    assert jobs["test"]["runs-on"].startswith("ubuntu") and jobs["engines"]["runs-on"][0] == "self-hosted"
    assert [step["run"] for step in jobs["test"]["steps"] if "run" in step] == ["make lint", "make test"]
    assert jobs["engines"]["container"]["image"] == CONTAINER and workflow()["permissions"] == {"contents": "read"}
    assert "github.event_name == 'workflow_dispatch'" in jobs["matrix"]["if"] and jobs["engines"]["needs"] == "matrix"
    for job in jobs.values():
        for step in job["steps"]:
            assert "@" in step.get("uses", "@") and "${{ inputs" not in step.get("run", ""), "input into a shell"
            for line in re.split(r"[\n;|]", step.get("run", "")):
                words = shlex.split(line.strip())
                if words[:1] == ["trtllm-redrafter"]:
                    check_command(words[1:])
                if "scripts/ci_engines.py" in words:
                    assert words[words.index("scripts/ci_engines.py") + 1] in ("matrix", "golden")
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    used = set(re.findall(r"matrix\.engine\.(\w+)", text))
    assert used == {"name", "gpu", "ranks", "base", "drafter", "min_acceptance", "key"}


def test_engines_are_built_once_and_not_cut_short() -> None:
    """An empty matrix is an error to GitHub; a push must not cancel a build; hosted caches end at 10 GB."""
    whole, engines = workflow(), workflow()["jobs"]["engines"]
    assert engines["if"] == "needs.matrix.outputs.engines != '[]'"
    assert "github.event_name" in whole["concurrency"]["group"]
    assert "workflow_dispatch" in whole["concurrency"]["cancel-in-progress"]
    assert engines["concurrency"] == {"group": "engine-${{ matrix.engine.key }}", "cancel-in-progress": False}
    assert all("timeout-minutes" in job for job in whole["jobs"].values())
    assert not any("actions/cache" in step.get("uses", "") for step in engines["steps"])
    build = next(step["run"] for step in engines["steps"] if "pipeline" in step.get("run", ""))
    kept = re.findall(r"tensorrt_llm\.cache_dir=(\S+)", build)
    assert [f"{path}:{path}" in engines["container"]["volumes"] for path in kept] == [True]


def test_a_matrix_may_be_empty(ci_engines: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cpu.yaml").write_text("backend: torch\nbase: models/x\n")
    assert ci_engines.main(["matrix", "--configs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "engines=[]\n"


def test_matrix_of_engines(ci_engines: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    engines = ci_engines.matrix(ROOT / "configs", [])
    assert {e["name"] for e in engines} >= {"llama-3.1-8b", "llama-3.3-70b-tp4", "qwen2.5-7b-fp8"}
    assert not {e["name"] for e in engines} & {"h100-latency", "smollm2-demo"}
    by_name = {e["name"]: e for e in engines}
    assert by_name["llama-3.3-70b-tp4"]["ranks"] == 4 and by_name["llama-3.1-8b"]["gpu"] == "h100-80gb"
    assert len({e["key"] for e in engines}) == len(engines) and all(1 < e["min_acceptance"] < 6 for e in engines)
    assert ci_engines.main(["matrix", "--only", "qwen3-8b, mistral-7b"]) == 0
    name, _, value = capsys.readouterr().out.strip().partition("=")
    assert name == "engines" and {e["name"] for e in json.loads(value)} == {"qwen3-8b", "mistral-7b"}
    assert set(json.loads(value)[0]) == {"name", "base", "drafter", "gpu", "ranks", "key", "min_acceptance"}
    with pytest.raises(UsageError, match="no recipe: nothing"):
        ci_engines.matrix(ROOT / "configs", ["nothing"])


def test_the_key_follows_content(ci_engines: ModuleType, tmp_path: Path) -> None:
    def key(extra: str) -> str:
        (tmp_path / "one.yaml").write_text(
            "preset: h100-latency\nbase: elsewhere/Qwen3-8B\ndrafter: some/where\n" + extra
        )
        found: str = ci_engines.matrix(tmp_path, [])[0]["key"]
        return found

    assert key("") == key("work_dir: elsewhere\n") and key("") == key("")
    others = ("build: {max_batch_size: 2}", "tensorrt_llm: {gpu: h200}", "tensorrt_llm: {kv_cache_fraction: 0.8}")
    assert len({key(""), *(key(other + "\n") for other in others)}) == 4


def test_a_recipe_that_does_not_fit_fails_the_matrix(
    ci_engines: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "big.yaml").write_text("preset: h100-latency\nbase: m/Llama-3.3-70B-Instruct\ndrafter: d\n")
    assert ci_engines.main(["matrix", "--configs", str(tmp_path)]) == 4
    assert "does not fit" in capsys.readouterr().err


def test_golden_tokens(ci_engines: ModuleType, tmp_path: Path) -> None:
    report, file = {"ok": True, "token_ids": [[1, 2], [3]]}, tmp_path / "golden" / "x.json"
    assert "is new" in ci_engines.golden(report, file)
    assert ci_engines.golden(report, file) is None
    for changed in ([[1, 2], [4]], [[1, 2]]):
        with pytest.raises(VerificationError, match="not the golden ones"):
            ci_engines.golden({"ok": True, "token_ids": changed}, file)
    for bad in ({"ok": False, "token_ids": [[1]]}, {"ok": True}, {"ok": True, "token_ids": []}):
        with pytest.raises(InputError):
            ci_engines.golden(bad, file)
    output = tmp_path / "gate.out"
    output.write_text("text before\n" + json.dumps(report) + "\n")
    assert ci_engines.main(["golden", "--report", str(output), "--file", str(file)]) == 0
    assert ci_engines.main(["golden", "--report", str(output), "--file", str(tmp_path / "new.json")]) == 10
    output.write_text("no document\n")
    assert ci_engines.main(["golden", "--report", str(output), "--file", str(file)]) == 3


def test_make_targets() -> None:
    text = (ROOT / "Makefile").read_text()
    assert re.search(r"^docker:", text, re.M) and re.search(r"^test-gpu:", text, re.M)
    assert "--target build" in text and "--target serve" in text and "tests/gpu" in text
