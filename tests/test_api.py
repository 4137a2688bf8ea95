"""The Python API: cheap to import, callable in every order of imports, the commands' defaults and errors."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from tests.cli.tiny import write_models
from trtllm_redrafter.errors import RequestError, UsageError
from trtllm_redrafter.run import api
from trtllm_redrafter.settings.schema import BuildSection, ConvertSection


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api")
    base, drafter = write_models(path)
    api.convert(str(base), path / "checkpoint", drafter=drafter, num_beams=3)
    return api.build(path / "checkpoint", path / "engine", max_seq_len=96, max_batch_size=2)


@pytest.mark.parametrize(
    "code",
    [
        "import trtllm_redrafter, sys; assert 'torch' not in sys.modules",
        "from trtllm_redrafter import convert; convert",
        "import trtllm_redrafter.conversion; from trtllm_redrafter import convert, build; convert",
        "from trtllm_redrafter import build, load_engine, convert; convert",
        "import trtllm_redrafter.run.api; from trtllm_redrafter import convert",
    ],
)
def test_imports(code: str) -> None:
    """`convert` is a function and a subpackage; whichever a program meets first, the name can be called."""
    check = f"{code}\ntry:\n    convert(base='nowhere', output='out', tp_size=0)\nexcept NameError: pass\n"
    check += "except Exception as e: assert type(e).__name__ == 'UsageError', e\n"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_attribute_errors() -> None:
    import trtllm_redrafter

    with pytest.raises(AttributeError, match="conjure"):
        _ = trtllm_redrafter.conjure  # type: ignore[attr-defined]


def test_generate_and_stream_agree(engine: Path) -> None:
    with api.load_engine(engine) as loaded:
        assert loaded.info.draft_shape is not None and loaded.info.draft_shape.num_beams == 3
        prompts = ["one", [{"role": "user", "content": "one"}], "another"]
        results = loaded.generate(prompts, max_tokens=7)
        assert results[0].token_ids == results[1].token_ids != results[2].token_ids
        assert loaded.generate(["one"], max_tokens=7, draft=False)[0].token_ids == results[0].token_ids
        updates = list(loaded.stream("one", max_tokens=7))
        assert [t for u in updates for t in u.token_ids] == results[0].token_ids
        assert "".join(u.text for u in updates) == results[0].text
        assert loaded.generate(["one"], chat=False, max_tokens=2)[0].prompt_tokens == 3
        stop = results[0].text[2:4]
        assert loaded.generate(["one"], max_tokens=7, stop=stop)[0].stop_reason == stop


def test_one_prompt_is_no_list_of_characters(engine: Path) -> None:
    messages = [{"role": "user", "content": "one"}]
    with api.load_engine(engine) as loaded:
        expected = loaded.generate(["one"], max_tokens=7)[0].token_ids
        for one in ("one", messages, tuple(messages), [messages]):
            assert [r.token_ids for r in loaded.generate(one, max_tokens=7)] == [expected]  # type: ignore[arg-type]


def test_streams_for_event_loops(engine: Path) -> None:
    """Other tasks go on between updates, and one that is cancelled leaves nothing running."""

    async def run(loaded: api.Engine) -> tuple[list[int], int]:
        ticks, tokens = 0, list[int]()

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(tick())
        async for update in loaded.astream("one", max_tokens=7):
            tokens += update.token_ids
        beside.cancel()
        unfinished = loaded.astream("another", max_tokens=30)
        await anext(unfinished)
        await unfinished.aclose()
        with pytest.raises(RequestError, match="temperature"):
            await anext(loaded.astream("one", temperature=-1.0))
        return tokens, ticks

    with api.load_engine(engine) as loaded:
        tokens, ticks = asyncio.run(run(loaded))
        assert tokens == loaded.generate("one", max_tokens=7)[0].token_ids and ticks > 1
        assert not loaded.runner.has_work


def test_another_shape_at_load(engine: Path) -> None:
    with api.load_engine(engine, num_beams=1, draft_len=2) as loaded:
        assert loaded.info.draft_shape is not None and loaded.info.draft_shape.max_tree_tokens == 3


def test_options_are_those_of_the_schema() -> None:
    """What type checkers are told, and what is accepted."""
    assert get_type_hints(api.ConvertKeys).keys() == ConvertSection.model_fields.keys()
    assert get_type_hints(api.BuildKeys).keys() == BuildSection.model_fields.keys()


def test_errors_name_the_argument(engine: Path) -> None:
    with pytest.raises(UsageError, match="flag tp_size"):
        api.convert("b", "c", tp_size=0)
    with pytest.raises(UsageError, match=r"did you mean 'convert\.tp_size'"):
        api.convert("b", "c", tp_sise=1)  # type: ignore[call-arg]
    with api.load_engine(engine) as loaded:
        with pytest.raises(RequestError, match="unknown sampling parameter"):
            loaded.generate(["one"], temprature=1.0)
        with pytest.raises(RequestError, match="temperature"):
            loaded.generate(["one"], temperature=-1.0)
        with pytest.raises(RequestError, match="prompts is empty"):
            loaded.generate([])
