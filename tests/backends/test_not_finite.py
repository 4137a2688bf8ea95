"""NaN and infinity: a request that meets them fails by name, its neighbours and the slot's next one do not feel it.

One token's embedding is NaN. A prompt that holds it fails at once, a text that comes to it fails there, and drafts that
hold it are no harm. On every executor, with and without drafting, greedy and sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.backends.test_torch_graphs import no_gpu, on_graphs
from tests.engines import build_engine, convert_pair, load
from tests.tiny_models import write_base, write_drafter
from trtllm_redrafter.backends.base import FinishReason, Request, Result, SamplingParams
from trtllm_redrafter.backends.torch.runner import TorchRunner
from trtllm_redrafter.errors import NumericalError
from trtllm_redrafter.redrafter.sampling import NOT_FINITE, SamplingSettings, draw, finite_greedy, greedy

__all__ = ["no_gpu"]  # a fixture that every test here uses

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 64}
EXECUTORS = {"native": ("bfloat16", load), "pytorch": ("float32", load), "cuda-graphs": ("float32", on_graphs)}
PROMPTS = ((5, 9, 23, 7), (3,), (11, 60, 4, 44, 31, 17, 8, 9, 10))
GREEDY = SamplingParams(30, ignore_eos=True)
SAMPLED = SamplingParams(30, temperature=0.8, top_p=0.9, seed=3, ignore_eos=True)
NAN, INF = float("nan"), float("inf")

Damage = Callable[[dict[str, torch.Tensor]], object]


def damaged_engine(
    folder: Path, dtype: str, base_damage: Damage | None, drafter_damage: Damage | None, **sizes: int
) -> Path:
    """The same random weights each time, less what is damaged."""
    write_base(folder / "base", "llama", torch_dtype=dtype, **SIZES | sizes)
    write_drafter(folder / "drafter", hidden_size=64, exit_dim=128, vocab_size=64)
    for name, damage in (("base", base_damage), ("drafter", drafter_damage)):
        if damage is not None:
            file = folder / name / "model.safetensors"
            tensors = load_file(file)
            damage(tensors)
            save_file(tensors, file, metadata={"format": "pt"})
    # Damage that came after the build: `convert` and `build` refuse such weights.
    checks = [
        f"trtllm_redrafter.{module}.non_finite_count" for module in ("conversion.sources", "checkpoint.structure")
    ]
    with patch(checks[0], return_value=0), patch(checks[1], return_value=0):
        return build_engine(convert_pair(folder), folder / "engine")


def make(
    folder: Path, executor: str, base_damage: Damage | None = None, drafter_damage: Damage | None = None
) -> TorchRunner:
    dtype, loaded = EXECUTORS[executor]
    runner = loaded(damaged_engine(folder, dtype, base_damage, drafter_damage))
    assert runner.executor.name == executor
    return runner


def finished(runner: TorchRunner, sampling: SamplingParams, *, draft: bool = True) -> list[Result]:
    """Results of PROMPTS as one batch, whether they failed or not."""
    ids = [runner.submit(Request(p, sampling, draft=draft)) for p in PROMPTS]
    found: dict[str, Result] = {}
    while runner.has_work:
        found |= {u.request_id: u.result for u in runner.step() if u.result is not None}
    return [found[i] for i in ids]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_text_fails_where_its_numbers_end(tmp_path: Path, executor: str, sampling: SamplingParams) -> None:
    good = make(tmp_path / "good", executor)
    texts = [r.token_ids for r in finished(good, sampling, draft=False)]
    others = {*texts[1], *texts[2], *(t for p in PROMPTS for t in p)}
    place, token = next((i, t) for i, t in enumerate(texts[0]) if i > 0 and t not in others)
    bad = make(
        tmp_path / "bad", executor, lambda t: t["model.embed_tokens.weight"].__setitem__(token, torch.tensor(NAN))
    )
    for draft in (False, True):
        first, *rest = finished(bad, sampling, draft=draft)
        assert first.finish_reason is FinishReason.ERROR and isinstance(first.error, NumericalError)
        assert first.token_ids == texts[0][: len(first.token_ids)] and 1 <= len(first.token_ids) <= place + 1
        assert "are not finite numbers" in str(first.error) and first.request_id in str(first.error)
        assert [r.token_ids for r in rest] == texts[1:] and all(r.error is None for r in rest)
    # every slot has been used by the one that failed or may be next: nothing of it is left
    assert [[r.token_ids for r in finished(bad, sampling)[1:]] for _ in range(3)] == [texts[1:]] * 3


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_prompt_fails_at_once(tmp_path: Path, executor: str) -> None:
    """generate() ends the others first, raises, and gives their results along."""
    bad = make(tmp_path, executor, lambda t: t["model.embed_tokens.weight"].__setitem__(23, torch.tensor(NAN)))
    alone = [bad.generate([Request(p, GREEDY)])[0].token_ids for p in PROMPTS[1:]]
    with pytest.raises(NumericalError, match="the logits after the prompt are not finite") as caught:
        bad.generate([Request(p, GREEDY) for p in PROMPTS])
    first, *rest = caught.value.results
    assert isinstance(first, Result) and first.token_ids == [] and first.text == ""
    assert [r.token_ids for r in rest if isinstance(r, Result)] == alone
    with pytest.raises(NumericalError):
        list(bad.stream(Request(PROMPTS[0], SAMPLED)))
    assert not bad.has_work


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_wherever_the_damage_is(tmp_path: Path, executor: str, name: str, value: float) -> None:
    """One weight of many; of the head's, a single logit is affected."""
    runner = make(tmp_path, executor, lambda t: t[name].view(-1).__setitem__(slice(7, 8), value))
    failed = [r.error for sampling in (GREEDY, SAMPLED) for r in finished(runner, sampling)]
    if name == "lm_head.weight" and abs(value) == INF:  # a logit of -inf is never chosen, as if it were very low
        assert any(isinstance(error, NumericalError) for error in failed)
    else:
        assert all(isinstance(error, NumericalError) for error in failed)


def test_float16_that_overflows_names_bfloat16(tmp_path: Path) -> None:
    write_base(tmp_path / "base", "llama", torch_dtype="float16", **SIZES)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.gate_proj.weight"] += 200.0
    tensors["model.layers.0.mlp.up_proj.weight"] += 200.0
    save_file(tensors, file, metadata={"format": "pt"})
    runner = load(build_engine(convert_pair(tmp_path, drafter=False), tmp_path / "engine"))
    with pytest.raises(NumericalError, match="float16 ends at 65504") as caught:
        runner.generate([Request(PROMPTS[0], GREEDY)])
    assert "--dtype bfloat16" in str(caught.value) and caught.value.exit_code == 9


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_broken_drafter_changes_no_text_and_is_named(tmp_path: Path, executor: str) -> None:
    good = make(tmp_path / "good", executor)
    texts = [r.token_ids for r in finished(good, GREEDY)]
    assert good.drafter_error is None
    bad = make(tmp_path / "bad", executor, None, lambda t: t["rnn_u.bias"].__setitem__(0, torch.tensor(NAN)))
    found = finished(bad, GREEDY)
    assert [r.token_ids for r in found] == texts and all(r.error is None and r.drafted_tokens == 0 for r in found)
    assert isinstance(bad.drafter_error, NumericalError) and "drafter" in str(bad.drafter_error)


def test_rows_without_a_largest_number_draw_nothing() -> None:
    rows = torch.tensor([[1.0, 3.0, 3.0], [1.0, NAN, 0.0], [INF, 0.0, 1.0], [-INF] * 3, [-INF, 0.5, 0.0]])
    assert finite_greedy(rows).tolist() == [1, NOT_FINITE, NOT_FINITE, NOT_FINITE, 1]
    tied = torch.randint(-3, 3, (50, 400)).to(torch.bfloat16)
    assert torch.equal(finite_greedy(tied), greedy(tied))
    settings = SamplingSettings.of([SamplingParams(1, temperature=t) for t in (0.0, 1.0, 0.0, 1.0, 1.0)])
    drawn = draw(rows, settings, torch.full((5,), 0.1))
    assert drawn.tolist() == [1, NOT_FINITE, NOT_FINITE, NOT_FINITE, 1]
