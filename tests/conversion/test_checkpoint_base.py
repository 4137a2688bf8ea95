"""An existing TensorRT-LLM checkpoint as base: its bytes stay, a drafter joins, quantization spares the drafter."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from tests.conversion.conftest import Convert, Options
from tests.conversion.fp8 import quantize_fp8
from tests.engines import write_tokenizer
from tests.tiny_models import drafter_tensors, write_base, write_drafter, write_tied_drafter
from trtllm_redrafter.checkpoint.reader import Checkpoint
from trtllm_redrafter.checkpoint.safetensors_io import SafetensorsFile
from trtllm_redrafter.conversion.plan import plan_conversion
from trtllm_redrafter.errors import MismatchError
from trtllm_redrafter.verify.files import verify_files

PEER = Path(__file__).parents[1] / "data" / "peer"


@pytest.fixture
def plain(tmp_path: Path, run: Convert) -> Path:
    """A plain checkpoint for two ranks."""
    base = write_base(tmp_path / "base", torch_dtype="bfloat16")
    write_tokenizer(base, 96)
    return run(base, tp_size=2, output=tmp_path / "plain").path


def assert_base_bytes(base: Path, result: Path) -> None:
    for file in sorted(base.glob("rank*.safetensors")):
        before, after = SafetensorsFile.open(file), SafetensorsFile.open(result / file.name)
        a, b = file.read_bytes(), (result / file.name).read_bytes()
        for name, info in before.items():
            found = after[name]
            assert (found.dtype, found.shape) == (info.dtype, info.shape)
            assert b[found.begin : found.end] == a[info.begin : info.end], name
        assert all(name.startswith("drafter.") for name in set(after) - set(before))


def test_a_drafter_joins_a_plain_checkpoint(plain: Path, tmp_path: Path, run: Convert) -> None:
    result = run(plain, write_drafter(tmp_path / "drafter"), tp_size=2)
    assert_base_bytes(plain, result.path)
    for name, tensor in drafter_tensors().items():
        assert torch.equal(result.load("drafter." + name), tensor.to(torch.bfloat16))
    direct = run(tmp_path / "base", tmp_path / "drafter", tp_size=2, output=tmp_path / "direct")
    assert (result.path / "rank1.safetensors").read_bytes() == (direct.path / "rank1.safetensors").read_bytes()
    assert result.config == direct.config
    copied = result.path / "tokenizer" / "tokenizer.json"
    assert copied.read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
    assert result.manifest is not None and result.manifest.derived["eos_token_ids"] == [2]


@pytest.mark.parametrize("excludes", [None, ["lm_head"], []])
def test_fp8_base_spares_the_whole_drafter(
    excludes: list[str] | None, plain: Path, tmp_path: Path, run: Convert
) -> None:
    fp8 = quantize_fp8(plain, tmp_path / "fp8", excludes)
    result = run(fp8, write_drafter(tmp_path / "drafter", exit_dim=48), tp_size=2)
    assert_base_bytes(fp8, result.path)
    section = json.loads((result.path / "config.json").read_text())["quantization"]
    assert section["quant_algo"] == "FP8"
    patterns = section["exclude_modules"]
    modules = [n.removesuffix(".weight") for n in result.names() if n.startswith("drafter.") and n.endswith(".weight")]
    assert "drafter.input_proj" in modules and "drafter.lm_head" in modules
    for module in [*modules, "transformer.vocab_embedding"]:
        assert any(fnmatchcase(module, pattern) for pattern in patterns), module
    assert not any(fnmatchcase("transformer.layers.0.mlp.fc", pattern) for pattern in patterns)
    assert any(fnmatchcase("lm_head", pattern) for pattern in patterns) == (excludes != [])
    for name in ("drafter.input_proj.weight", "drafter.rnn_u.weight"):
        assert result.ranks[0][name].dtype == "BF16"
    assert verify_files(result.path, hashes=True).ok


def test_a_quantized_head_cannot_be_borrowed(plain: Path, tmp_path: Path, options: Options) -> None:
    fp8 = quantize_fp8(plain, tmp_path / "fp8", [])
    with pytest.raises(MismatchError, match="LM head, which cannot be read"):
        plan_conversion(options(fp8, write_tied_drafter(tmp_path / "drafter"), tp_size=2))


def test_fp8_weights_load_as_numbers(plain: Path, tmp_path: Path) -> None:
    fp8 = Checkpoint.open(quantize_fp8(plain, tmp_path / "fp8", ["lm_head"]))
    exact = Checkpoint.open(plain)
    name = "transformer.layers.1.attention.qkv.weight"
    loaded = fp8.load(name)
    assert loaded.dtype == torch.bfloat16
    assert fp8.ranks[0][name].dtype == "F8_E4M3"
    assert torch.allclose(loaded.float(), exact.load(name).float(), rtol=2**-3, atol=0.01)
    assert torch.equal(fp8.load("lm_head.weight"), exact.load("lm_head.weight"))


def test_borrowed_heads_work_with_divided_checkpoints(plain: Path, tmp_path: Path, run: Convert) -> None:
    for exit_dim in (32, 16):
        drafter = write_tied_drafter(tmp_path / f"tied{exit_dim}", exit_dim=exit_dim)
        joined = run(plain, drafter, tp_size=2, overwrite=True)
        head = joined.load("drafter.lm_head.weight").clone()
        direct = run(tmp_path / "base", drafter, tp_size=1, output=tmp_path / f"direct{exit_dim}")
        assert torch.equal(head, direct.load("drafter.lm_head.weight"))


def test_unfitting_options_and_drafter_are_reported_together(plain: Path, tmp_path: Path, options: Options) -> None:
    drafter = write_drafter(tmp_path / "drafter", hidden_size=48)
    with pytest.raises(MismatchError) as e:
        plan_conversion(options(plain, drafter, tp_size=4, dtype="float16"))
    for part in ("has 2 tensor-parallel rank(s), 4 are asked for", "--tp-size 2", "is bfloat16, float16 is asked for",
                 "hidden size is 48, the base's 32"):  # fmt: skip
        assert part in str(e.value)


def test_a_second_drafter_is_refused(plain: Path, tmp_path: Path, run: Convert, options: Options) -> None:
    drafter = write_drafter(tmp_path / "drafter")
    result = run(plain, drafter, tp_size=2)
    with pytest.raises(MismatchError, match="has a drafter already"):
        plan_conversion(options(result.path, drafter, tp_size=2, output=tmp_path / "again"))


def test_the_padded_vocabulary_of_awq_is_explained(tmp_path: Path, options: Options) -> None:
    base = PEER / "expected" / "llama-awq-int4_awq-bf16"
    drafter = write_drafter(tmp_path / "drafter", hidden_size=256, exit_dim=64, vocab_size=1001)
    with pytest.raises(MismatchError, match="pads the vocabulary to a multiple of 64"):
        plan_conversion(options(base, drafter))


def test_awq_with_a_fitting_drafter(tmp_path: Path, run: Convert) -> None:
    base = PEER / "expected" / "llama-awq-int4_awq-bf16"
    drafter = write_drafter(tmp_path / "drafter", hidden_size=256, exit_dim=64, vocab_size=1024)
    result = run(base, drafter)
    assert_base_bytes(base, result.path)
    config = json.loads((result.path / "config.json").read_text())
    assert config["quantization"]["group_size"] == 128
    assert config["quantization"]["exclude_modules"][0] == "lm_head"
    assert "drafter*" in config["quantization"]["exclude_modules"]
    assert config["architecture"] == "ReDrafterForLLaMALM" and config["base_model_architecture"] == "LlamaForCausalLM"


def test_qwen_type_is_added_to_the_exporters_config(tmp_path: Path, run: Convert) -> None:
    drafter = write_drafter(tmp_path / "drafter", hidden_size=64, exit_dim=128, vocab_size=1001)
    config = json.loads((run(PEER / "expected" / "qwen3-bf16", drafter).path / "config.json").read_text())
    assert config["architecture"] == "ReDrafterForQWenLM"
    assert (config["qwen_type"], config["attn_bias"], config["seq_length"]) == ("qwen3", False, 8192)
    assert config["base_model_architecture"] == "Qwen3ForCausalLM"


def test_quant_cfg_is_copied(plain: Path, tmp_path: Path, run: Convert) -> None:
    (plain / "quant_cfg.json").write_text('{"quantized_layers": {}}')
    (plain / "manifest.json").unlink()
    result = run(plain, tp_size=2)
    assert (result.path / "quant_cfg.json").read_text() == '{"quantized_layers": {}}'
    assert result.manifest is not None and "quant_cfg.json" in result.manifest.files


def test_a_base_checkpoint_without_a_tensor(plain: Path, options: Options) -> None:
    from safetensors.torch import load_file, save_file

    for rank in range(2):
        tensors = load_file(plain / f"rank{rank}.safetensors")
        del tensors["transformer.ln_f.weight"]
        save_file(tensors, plain / f"rank{rank}.safetensors")
    with pytest.raises(MismatchError, match=r"tensor 'transformer.ln_f.weight' is missing"):
        plan_conversion(options(plain, tp_size=2))
