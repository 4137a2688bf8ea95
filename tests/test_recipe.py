"""Recipe layers, their provenance, and the message for everything that can be wrong in one."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from trtllm_redrafter.errors import InputError, RedrafterError, UsageError
from trtllm_redrafter.redrafter.config import DraftShape
from trtllm_redrafter.run.options import asked_draft_shape, build_options, convert_options, require, with_directories
from trtllm_redrafter.settings import (
    Layer,
    Origin,
    Resolved,
    file_layers,
    flag_layers,
    preset_layer,
    resolve,
    set_layer,
)
from trtllm_redrafter.settings.schema import ConvertSection, Recipe, keys
from trtllm_redrafter.settings.values import fill

CONFIGS = Path(__file__).parent.parent / "configs"


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(text)
    return path


def message(call: object, *args: object) -> str:
    assert callable(call)
    with pytest.raises(RedrafterError) as caught:
        call(*args)
    return str(caught.value)


def test_defaults_are_valid_and_every_key_has_a_description() -> None:
    resolved = resolve([])
    assert resolved.recipe == Recipe()
    assert all(field.description for field in keys().values())
    assert all(origin.kind == "default" for origin in resolved.origins.values())


def test_flag_over_file_over_preset_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.yaml").write_text("convert: {tp_size: 2, num_beams: 3, workers: 2}\n")
    path = recipe(tmp_path, "preset: small\nconvert: {num_beams: 4, workers: 3}\n")
    resolved = resolve([*file_layers(path), *flag_layers({"convert.workers": ("--workers", 5)})])
    found = {key: (resolved.value(key), resolved.origins[key].render()) for key in ("convert.tp_size",)}
    assert found == {"convert.tp_size": (2, "preset small")}
    assert (resolved.recipe.convert.num_beams, resolved.origins["convert.num_beams"].render()) == (4, f"file {path}")
    assert (resolved.recipe.convert.workers, resolved.origins["convert.workers"].render()) == (5, "flag --workers")
    assert resolved.origins["convert.dtype"].render() == "default"


def test_flags_that_are_not_given_change_nothing() -> None:
    assert flag_layers({"run.seed": ("--seed", None)}) == []


def test_set_takes_yaml_values() -> None:
    resolved = resolve([set_layer(["run.prompts=[a, b c]", "run.seed=7", "drafter=null", "run.chat=false"])])
    run = resolved.recipe.run
    assert (run.prompts, run.seed, resolved.recipe.drafter, run.chat) == (("a", "b c"), 7, None, False)
    assert resolved.origins["run.seed"].render() == "flag --set"


def test_render_aligns_keys_values_and_origins() -> None:
    text = resolve([set_layer(["base=models/base", "convert.num_beams=4"])]).render("", "convert")
    assert "base                        models/base  flag --set" in text
    assert "convert.num_beams           4            flag --set" in text
    assert "convert.draft_len           null         default" in text
    assert "run.seed" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("convert: {num_beam: 4}", ["unknown key 'convert.num_beam'", "did you mean 'convert.num_beams'?"]),
        ("num_beams: 4", ["unknown key 'num_beams'", "'convert.num_beams' or 'run.num_beams'"]),
        ("bild: {max_batch_size: 4}", ["unknown key 'bild'", "did you mean 'build'?"]),
        ("zzz: 1", ["unknown key 'zzz'", "--dry-run"]),
        ("convert: 4", ["convert is a section", "write its keys below it"]),
        ("convert: {tp_size: two}", ["convert.tp_size is two", "it should be a valid integer"]),
        ("convert: {tp_size: '2'}", ["convert.tp_size is 2", "it should be a valid integer"]),
        ("convert: {tp_size: 2.0}", ["convert.tp_size is 2.0", "it should be a valid integer"]),
        ("convert: {tp_size: true}", ["convert.tp_size is true"]),
        ("convert: {greedy: 1}", ["convert.greedy is 1", "it should be a valid boolean"]),
        ("convert: {dtype: bf16}", ["convert.dtype is bf16", "'bfloat16'"]),
        ("backend: tensorrt-rtx", ["backend is tensorrt-rtx", "'tensorrt-llm' or 'tensorrt'"]),
        ("run: {temperature: -1}", ["run.temperature is -1", "greater than or equal to 0"]),
        ("run: {temperature: .inf}", ["run.temperature is inf", "finite"]),
        ("run: {top_p: 0}", ["run.top_p is 0", "greater than 0"]),
        ("run: {prompts: [a, '']}", ["run.prompts is [a, '']"]),
        ("run: {seed: 9223372036854775808}", ["run.seed is 9223372036854775808"]),
    ],
)
def test_wrong_keys_and_values(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = recipe(tmp_path, text + "\n")
    said = message(lambda: resolve(file_layers(path)))
    assert all(part in said for part in [*expected, str(path), "remedy"]), said


def test_pipeline_parallelism_is_refused_with_the_reason() -> None:
    said = message(lambda: resolve([set_layer(["convert.pp_size=2"])]))
    assert "unknown key 'convert.pp_size'" in said and "drafter needs embedding and LM head" in said


def test_all_problems_of_all_layers_come_together(tmp_path: Path) -> None:
    path = recipe(tmp_path, "convert: {num_beam: 4, dtype: bf16}\n")
    said = message(lambda: resolve([*file_layers(path), set_layer(["run.top_k=-1", "run.temprature=1"])]))
    for part in ("'convert.num_beam'", "dtype is bf16", "top_k is -1", "'run.temprature'", "flag --set"):
        assert part in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: [1", ["not valid YAML", "line 1"]),
        ("base: a\nbase: b", ["the key 'base' appears twice", "line 2"]),
        ("convert:\n  workers: 1\n  workers: 2", ["'workers' appears twice", "line 3"]),
        ("base: a\nrun: &r {prompts: [*r]}", ["*r is used inside its own anchor", "line 2"]),
        ("? [a, b]\n: 1", ["a key is a list or a mapping", "line 1"]),
        ("- base", ["not a mapping"]),
        ("3: 4", ["not a mapping"]),
        ("base: !!python/object:os.system {}", ["not valid YAML"]),
        ("preset: nowhere", ["there is no preset 'nowhere'", "smollm2-demo"]),
        ("preset: ../secrets", ["'../secrets' is not a name"]),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = recipe(tmp_path, text)
    said = message(file_layers, path)
    assert all(part in said for part in [*expected, str(path)]), said


def test_missing_and_binary_files(tmp_path: Path) -> None:
    assert "cannot read the recipe" in message(file_layers, tmp_path / "none.yaml")
    (tmp_path / "demo.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the recipe" in message(file_layers, tmp_path / "demo.yaml")
    assert file_layers(recipe(tmp_path, "# nothing\n"))[0].values == {}


def test_a_preset_does_not_build_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text("preset: b\n")
    with pytest.raises(InputError, match="another preset"):
        preset_layer("a", asked_by="--preset")


@pytest.mark.parametrize("pair", ["convert.num_beams", "=4", "run.prompts=[a"])
def test_malformed_set(pair: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        set_layer([pair])


def test_an_empty_section_is_no_change() -> None:
    assert resolve([Layer(Origin("file", "x"), {"run": None})]).recipe == Recipe()


def test_home_is_expanded() -> None:
    assert resolve([set_layer(["base=~/models"])]).recipe.base == Path.home() / "models"


def test_directories_follow_the_recipes_name_and_say_so() -> None:
    resolved = with_directories(resolve([set_layer(["engine=here"])]), name="demo")
    rows = {key: (value, origin) for key, value, origin in resolved.rows()}
    assert rows["work_dir"] == ("runs/demo", "derived from the recipe's name")
    assert rows["checkpoint"] == ("runs/demo/checkpoint", "derived from work_dir")
    assert rows["engine"] == ("here", "flag --set")


def test_required_keys_are_missed_together() -> None:
    said = message(lambda: convert_options(resolve([]), overwrite=False))
    assert "--base is not given" in said and "--output is not given" in said and "set `checkpoint`" in said
    assert "--engine is not given" in message(lambda: require(resolve([]), {"engine": "--engine"}, "a run"))


def full(*pairs: str) -> Resolved:
    return resolve([set_layer(["base=b", "checkpoint=c", "engine=e", *pairs])])


def test_rooms_get_every_value() -> None:
    options = convert_options(full("convert.tp_size=2", "convert.draft_len=4"), overwrite=True)
    assert (options.base, options.output, options.drafter) == (Path("b"), Path("c"), None)
    assert (options.tp_size, options.num_beams, options.draft_len, options.overwrite) == (2, None, 4, True)
    build = build_options(full("build.max_seq_len=64", "build.max_input_len=32"), overwrite=False)
    assert (build.checkpoint, build.output, build.backend) == (Path("c"), Path("e"), "torch")
    assert (build.max_seq_len, build.max_input_len, build.tokenizer) == (64, 32, None)


def test_draft_shape_over_the_engines_own() -> None:
    own = DraftShape(4, 3)
    assert asked_draft_shape(full(), own) is None
    assert asked_draft_shape(full("run.num_beams=2"), own) == DraftShape(2, 3)
    assert asked_draft_shape(full("run.draft_len=1"), own) == DraftShape(4, 1)
    assert "no drafter" in message(lambda: asked_draft_shape(full("run.num_beams=2"), None))
    assert "more than 50" in message(lambda: asked_draft_shape(full("run.num_beams=51"), own))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    resolve(file_layers(path))


def test_the_documentation_lists_every_key_and_its_default() -> None:
    """docs/recipe.md is written by hand and must not fall behind the schema."""
    text = (CONFIGS.parent / "docs" / "recipe.md").read_text()
    missing = [key for key in keys() if f"`{key}`" not in text]
    assert not missing, difflib.get_close_matches(missing[0], text.split(), 1)
    block = text.split("```yaml")[1].split("```")[0]
    resolve([Layer(Origin("file", "docs/recipe.md"), yaml.safe_load(block))])


def bomb(levels: int) -> str:
    """Lists of nine aliases each: levels lines of YAML, nine to the power of levels values."""
    names = "abcdefghijklmnop"
    lines = ["prompts:", "- &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"- &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in pairwise(names[:levels])]
    return "run:\n  " + "\n  ".join(lines) + "\n"


def test_aliases_are_counted_as_what_they_stand_for(tmp_path: Path) -> None:
    assert "with its aliases written out" in message(file_layers, recipe(tmp_path, bomb(14)))
    assert file_layers(recipe(tmp_path, bomb(3)))[0].values["run"]["prompts"][2][0][0][0] == "x"


@pytest.mark.parametrize(
    "setting",
    ["build.max_batch_size=9223372036854775808", "convert.num_beams=0", "convert.tp_size=4294967296", 'base="a\\0b"'],
)
def test_sizes_and_paths_beyond_reason(setting: str) -> None:
    with pytest.raises(UsageError, match=setting.partition("=")[0]):
        resolve([set_layer([setting])])


def test_a_recipe_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "demo.yaml")
    assert "cannot read the recipe" in message(file_layers, tmp_path / "demo.yaml")


def test_fill_copies_what_is_shared() -> None:
    @dataclass
    class Options:
        tp_size: int
        dtype: str
        output: str
        note: str = "own"

    assert fill(Options, ConvertSection(tp_size=2), dtype="float16", output="here") == Options(2, "float16", "here")
    with pytest.raises(TypeError, match="output"):
        fill(Options, ConvertSection())
