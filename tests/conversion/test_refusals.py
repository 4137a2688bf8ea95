"""Every refusal: what, where, why, remedy; and no output directory."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.conftest import Options
from tests.tiny_models import write_base, write_drafter, write_drafter_config, write_tied_drafter
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.conversion.writer import convert
from trtllm_redrafter.errors import InputError, MismatchError, OutputError, RedrafterError, UsageError
from trtllm_redrafter.progress import no_progress


class Case:
    """A base and a drafter that fit; a test breaks one thing and says what it expects."""

    def __init__(self, tmp_path: Path, options: Options) -> None:
        self.tmp_path = tmp_path
        self.options = options
        self.base = write_base(tmp_path / "base", shards=2)
        self.drafter = write_drafter(tmp_path / "drafter")

    def refused(self, kind: type[RedrafterError], *parts: str, drafter: bool = True, **changes: Any) -> RedrafterError:
        before = sorted(self.tmp_path.iterdir())
        with pytest.raises(RedrafterError) as e:
            options = self.options(self.base, self.drafter if drafter else None, **changes)
            convert(plan_conversion(options), no_progress)
        text = str(e.value)
        for part in parts:
            assert part in text, text
        assert type(e.value) is kind, text
        assert e.value.exit_code != 0
        assert all(p.remedy for p in (e.value.problems or (e.value.problem,)) if not p.what.startswith("and ")), text
        assert sorted(self.tmp_path.iterdir()) == before
        return e.value

    def edit(self, path: Path, **changes: Any) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))

    def edit_tensors(self, change: Callable[[dict[str, torch.Tensor]], None], file: Path | None = None) -> None:
        path = file or self.drafter / "model.safetensors"
        tensors = load_file(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        change(tensors)
        save_file(tensors, path)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


@pytest.fixture
def case(tmp_path: Path, options: Options) -> Case:
    return Case(tmp_path, options)


# ---- options


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"tp_size": 0}, "tp_size is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
    ],
)
def test_options_out_of_range(case: Case, changes: dict[str, Any], part: str) -> None:
    case.refused(UsageError, part, **changes)


def test_draft_options_without_a_drafter(case: Case) -> None:
    case.refused(UsageError, "--num-beams 4", "--draft-len 3", drafter=False, num_beams=4, draft_len=3)


@pytest.mark.parametrize("where", ["base", "base/out", "."])
def test_output_that_overlaps_an_input(case: Case, where: str) -> None:
    case.edit(case.base)
    with pytest.raises(RedrafterError, match="overlaps the base directory"):
        plan_conversion(case.options(case.base, None, output=case.tmp_path / where, overwrite=True))
    assert (case.base / "config.json").exists()


def test_existing_output(case: Case) -> None:
    (case.tmp_path / "out").mkdir()
    (case.tmp_path / "out" / "precious").write_text("x")
    case.refused(OutputError, "exists already", "--overwrite", str(case.tmp_path / "out"))
    case.refused(OutputError, "not written by this program", overwrite=True)
    assert (case.tmp_path / "out" / "precious").exists()


def test_disk_too_small(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    case.refused(OutputError, "not enough disk space", "10 are free", str(case.tmp_path / "out"))


# ---- base model files


def test_missing_base(case: Case) -> None:
    case.base = case.tmp_path / "nowhere"
    case.refused(InputError, "does not exist", "nowhere", "--base")


def test_missing_config(case: Case) -> None:
    (case.base / "config.json").unlink()
    case.refused(InputError, "missing", "config.json")


def test_missing_shard(case: Case) -> None:
    (case.base / "model-00002-of-00002.safetensors").unlink()
    case.refused(InputError, "weight file is missing", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd"])
def test_index_that_leads_outside(case: Case, name: str) -> None:
    index = case.base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    case.refused(InputError, "leads outside", name)


def test_index_and_file_disagree(case: Case) -> None:
    index = case.base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    old = content["weight_map"]["model.norm.weight"]
    content["weight_map"]["model.norm.weight"] = next(f for f in files if f != old)
    index.write_text(json.dumps(content))
    case.refused(InputError, "'model.norm.weight' is not in the file the index names")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "{"])
def test_unusable_index(case: Case, content: str) -> None:
    (case.base / "model.safetensors.index.json").write_text(content)
    case.refused(InputError, "model.safetensors.index.json")


def test_only_pickled_weights(case: Case) -> None:
    for file in case.base.glob("model*"):
        file.unlink()
    (case.base / "pytorch_model.bin").write_bytes(b"x")
    case.refused(InputError, "neither model.safetensors nor", "pytorch_model.bin", "save_pretrained")


@pytest.mark.parametrize("cut", [1, 100, -4])
def test_truncated_weights(case: Case, cut: int) -> None:
    file = case.base / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    case.refused(InputError, "model-00001-of-00002.safetensors", "again")


def test_flipped_bit_in_a_header(case: Case) -> None:
    file = case.base / "model-00001-of-00002.safetensors"
    raw = bytearray(file.read_bytes())
    raw[12] ^= 0x80
    file.write_bytes(raw)
    case.refused(InputError, "not valid JSON", "model-00001")


def test_header_longer_than_the_file(case: Case) -> None:
    file = case.base / "model-00001-of-00002.safetensors"
    raw = bytearray(file.read_bytes())
    raw[3] = 1
    file.write_bytes(raw)
    case.refused(InputError, "header is longer than the file")


def test_unknown_architecture(case: Case) -> None:
    case.edit(case.base, architectures=["GPT2LMHeadModel"])
    case.refused(InputError, "'GPT2LMHeadModel' is not supported", "LlamaForCausalLM")


def test_missing_and_misshapen_and_surplus_tensors_together(case: Case) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in tensors if "mlp" in n)
        tensors[name] = tensors[name][:-1].contiguous()
        del tensors[next(n for n in tensors if "self_attn" in n)]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)

    base = write_base(case.tmp_path / "single")
    case.edit_tensors(change, base / "model.safetensors")
    case.base = base
    case.refused(InputError, "is missing", "has the wrong shape", "has no place in a LLaMA checkpoint")


def test_config_of_another_size_gives_a_short_message(case: Case) -> None:
    case.edit(case.base, num_hidden_layers=40)
    error = case.refused(InputError, "more problems like these")
    assert len(error.problems) < 20


def test_integer_weights(case: Case) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    base = write_base(case.tmp_path / "single")
    case.edit_tensors(change, base / "model.safetensors")
    case.base = base
    case.refused(InputError, "'model.norm.weight' is not a plain floating tensor", "I8")


def test_values_beyond_float16(case: Case) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = 70000.0

    base = write_base(case.tmp_path / "single")
    case.edit_tensors(change, base / "model.safetensors")
    case.base = base
    case.refused(MismatchError, "'transformer.ln_f.weight' do not fit float16", "bfloat16", dtype="float16")


def test_a_flipped_bit_in_a_hub_cache(case: Case) -> None:
    """Their large files are named by their SHA-256, so that damage anywhere in the data is found."""
    hub = case.tmp_path / "models--x--y"
    snapshot, blobs = hub / "snapshots" / "rev", hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in sorted(case.base.iterdir()):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    case.base = snapshot
    plan = plan_conversion(case.options(case.base, case.drafter))
    shutil.rmtree(convert(plan, no_progress))
    victim = (snapshot / "model-00002-of-00002.safetensors").resolve()
    raw = bytearray(victim.read_bytes())
    raw[-9] ^= 2
    victim.write_bytes(raw)
    case.refused(InputError, "not what was downloaded", "model-00002-of-00002.safetensors")


# ---- division over ranks


def test_tp_that_does_not_divide(case: Case) -> None:
    case.refused(
        MismatchError, "attention heads, 4, cannot be divided by 3", "2 KV heads", "drafter's hidden size, 32",
        "exit_dim, 64", tp_size=3,
    )  # fmt: skip


def test_odd_vocabulary_needs_one_rank_with_a_drafter(case: Case) -> None:
    case.base = write_base(case.tmp_path / "odd", vocab_size=97)
    case.drafter = write_drafter(case.tmp_path / "odd-drafter", vocab_size=97)
    case.refused(MismatchError, "vocabulary (with a drafter), 97, cannot be divided by 2", tp_size=2)
    plan_conversion(case.options(case.base, case.drafter, tp_size=1))
    plan_conversion(case.options(case.base, None, tp_size=2))


# ---- drafter


def test_everything_about_a_wrong_drafter_at_once(case: Case) -> None:
    case.drafter = write_drafter(case.tmp_path / "other_n_3_lr", hidden_size=48, vocab_size=80, draft_len=None)
    case.edit_tensors(without("lm_head.2.weight"))
    case.refused(
        MismatchError,
        "hidden size is 48, the base's 32",
        "vocabulary is 80, the base's 96",
        "has no 'lm_head.weight'",
        "num_beams is 51",
        "draft_len is 5",
        "trained for 3 (the drafter's directory name (other_n_3_lr))",
        num_beams=51,
        draft_len=5,
    )


def test_missing_lm_head(case: Case) -> None:
    case.edit_tensors(without("lm_head.2.weight"))
    case.refused(InputError, "the drafter has no 'lm_head.weight'", "without an error")


def test_missing_input_proj(case: Case) -> None:
    case.drafter = write_drafter(case.tmp_path / "narrow", exit_dim=48)
    case.edit_tensors(without("input_proj.bias"))
    case.refused(InputError, "has no 'input_proj.bias'")


def test_wrong_number_of_layers(case: Case) -> None:
    case.edit(case.drafter, num_draft_layers=1)
    case.refused(InputError, "'lm_head.2.weight' has no place in a drafter", "num_draft_layers")


def test_wrong_exit_dim(case: Case) -> None:
    case.edit(case.drafter, exit_dim=48)
    case.refused(InputError, "'layers.0.linear.weight' has the wrong shape", "has no 'input_proj.weight'")


def test_rnn_in_the_file_but_not_in_the_config(case: Case) -> None:
    case.edit(case.drafter, rnn=False)
    case.refused(InputError, "has 'rnn_u.weight', its config.json has no place for it")


def test_incomplete_drafter_config(case: Case) -> None:
    case.edit(case.drafter, rnn=None, exit_dim=None, hidden_size="32")
    case.refused(InputError, "rnn is missing", "exit_dim is missing", "hidden_size is '32'")


def test_unknown_drafter_tensor(case: Case) -> None:
    case.edit_tensors(lambda t: t.update({"attention.weight": torch.zeros(2)}))
    case.refused(InputError, "'attention.weight' has no place in a drafter")


def test_integer_drafter(case: Case) -> None:
    case.edit_tensors(lambda t: t.update({"rnn_w.weight": t["rnn_w.weight"].to(torch.int8)}))
    case.refused(InputError, "'rnn_w.weight' is not a floating tensor")


@pytest.mark.parametrize(("name", "value"), [("num_beams", 0), ("num_beams", 51), ("draft_len", 0), ("draft_len", 6)])
def test_draft_shape_out_of_range(case: Case, name: str, value: int) -> None:
    case.refused(MismatchError, f"{name} is {value}", **{name: value})


def test_drafter_directory_missing_or_empty(case: Case) -> None:
    case.drafter = case.tmp_path / "nowhere"
    case.refused(InputError, "drafter directory does not exist")
    case.drafter = write_drafter(case.tmp_path / "empty")
    (case.drafter / "model.safetensors").unlink()
    case.refused(InputError, "the drafter has no weights", "model.pt")


class Evil:
    """Unpickling this would leave a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


def test_a_pickle_that_holds_code_is_not_executed(case: Case) -> None:
    trap = case.tmp_path / "executed"
    for protocol_writer in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))):
        (case.drafter / "model.safetensors").unlink(missing_ok=True)
        protocol_writer({"rnn_u.weight": Evil(str(trap))}, case.drafter / "model.pt")
        case.refused(InputError, "not a plain dictionary of tensors", "safetensors")
        assert not trap.exists()


@pytest.mark.parametrize("value", [[torch.zeros(1)], {"a": 1}, {3: torch.zeros(1)}, torch.zeros(2), {}])
def test_pickles_of_something_else(case: Case, value: Any) -> None:
    (case.drafter / "model.safetensors").unlink()
    torch.save(value, case.drafter / "model.pt")
    case.refused(InputError, "model.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x02garbage"])
def test_damaged_pickles(case: Case, content: bytes) -> None:
    (case.drafter / "model.safetensors").unlink()
    (case.drafter / "model.pt").write_bytes(content)
    case.refused(InputError, "not a plain dictionary of tensors", "model.pt")


def test_truncated_pickle(case: Case) -> None:
    case.drafter = write_drafter(case.tmp_path / "pt", file="model.pt")
    file = case.drafter / "model.pt"
    file.write_bytes(file.read_bytes()[:-200])
    case.refused(InputError, "model.pt")


def test_tied_heads_that_cannot_be(case: Case) -> None:
    case.edit(case.drafter, tie_lm_head=True)
    case.refused(
        InputError, "tie_lm_head is true, but the file has an LM head", "exit_dim 64 is not the hidden size 32"
    )
    case.drafter = write_tied_drafter(case.tmp_path / "factor", exit_dim=16)
    case.edit(case.drafter, tie_lm_head=False)
    case.refused(InputError, "'lm_head_factor.weight' is there, but tie_lm_head is not true", "no 'lm_head.weight'")
    case.edit(case.drafter, tie_lm_head=True)
    case.edit_tensors(lambda t: t.update({"lm_head_factor.weight": torch.zeros(16, 32)}))
    case.refused(InputError, "'lm_head_factor.weight' does not fit", "[32, 16]")


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        (torch.tensor([1, 96], dtype=torch.int32), "outside the vocabulary"),
        (torch.tensor([-1, 4], dtype=torch.int32), "outside the vocabulary"),
        (torch.tensor([4, 4], dtype=torch.int32), "a token twice"),
        (torch.tensor([4, 5]), "no int32 list"),
        (torch.tensor([], dtype=torch.int32), "no int32 list"),
    ],
)
def test_bad_draft_vocabulary(case: Case, ids: torch.Tensor, part: str) -> None:
    save_file({"token_ids": ids}, case.drafter / "draft_vocab.safetensors")
    case.refused(InputError, part, "draft_vocab.safetensors")


def test_problems_of_base_and_drafter_come_together(case: Case) -> None:
    case.edit(case.base, hidden_act="gelu")
    write_drafter_config(case.drafter, hidden_size=32)
    case.refused(InputError, "hidden_act is 'gelu'", "exit_dim is missing")
