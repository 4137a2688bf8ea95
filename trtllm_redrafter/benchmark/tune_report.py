"""The report of `tune`: text, Markdown and one HTML page, and the recipe with the recommended shape.

write_tune_report(found, Path("report"), recipe, overwrite=False)   # tune.html, tune.md, tune.json, recipe.yaml
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trtllm_redrafter.benchmark import page
from trtllm_redrafter.benchmark.plots import grid_heat_map, user_against_total
from trtllm_redrafter.benchmark.prediction import Prediction, frontier, ranked
from trtllm_redrafter.benchmark.tuning import THIS, TuneResult
from trtllm_redrafter.fsio import CREATOR, atomic_directory, without_nan, write_json

TITLE = "Draft shapes"
HEADER = ["batch", "setting", "acceptance length", "interval", "step-time ratio", "speed-up", "interval", "per user",
          "total"]  # fmt: skip
CHECK_HEADER = ["batch", "setting", "predicted speed-up", "measured", "off by", "predicted tokens/s", "measured",
                "off by"]  # fmt: skip


def rows(found: TuneResult) -> list[list[str]]:
    """All settings, the fastest first; those on the frontier are marked."""
    best = frontier(found.predictions)
    batches = sorted({p.batch for p in found.predictions})
    return [_row(p, p in best) for batch in batches for p in ranked(found.predictions, batch)]


def _row(p: Prediction, on_frontier: bool) -> list[str]:
    return [
        str(p.batch),
        p.name + (" *" if on_frontier else ""),
        f"{p.acceptance_length.value:.2f}",
        f"{p.acceptance_length.low:.2f} to {p.acceptance_length.high:.2f}",
        f"{p.cost.ratio:.2f}",
        f"{p.speedup.value:.2f}",
        f"{p.speedup.low:.2f} to {p.speedup.high:.2f}",
        f"{p.user_tokens_per_second:.1f}",
        f"{p.total_tokens_per_second:.1f}",
    ]


def check_rows(found: TuneResult) -> list[list[str]]:
    return [
        [
            str(c.prediction.batch),
            c.prediction.name,
            f"{c.prediction.speedup.value:.2f}",
            c.measured_speedup.render(),
            f"{100 * c.speedup_error:+.1f} %",
            f"{c.prediction.user_tokens_per_second:.1f}",
            f"{c.measured_tokens_per_second:.1f}",
            f"{100 * c.speed_error:+.1f} %",
        ]
        for c in found.checks
    ]


def lead(found: TuneResult) -> str:
    where = "this machine" if found.target == THIS else found.target
    text = f"Target: {where}. {found.facts['texts']} texts of up to {found.facts['max_tokens']} tokens, written by "
    text += (
        f"{found.facts['written_by']}; step cost: {found.facts['step_cost']}. * is on the frontier: no other setting "
    )
    text += "is better for one user and for all at once. Intervals are those of the acceptance"
    text += "; decoding only." if found.target != THIS else " and of the step time; prompts are counted."
    if found.facts.get("left_out"):
        text += f" {len(found.facts['left_out'])} setting(s) are left out: the GPU cannot hold their batch."
    return text if found.complete else f"{text} The measurements were interrupted."


def render_text(found: TuneResult) -> str:
    """The report as Markdown that is readable in a terminal, too."""
    parts = [lead(found), "", page.markdown_table(HEADER, rows(found)), ""]
    if found.checks:
        parts += ["Measured:", "", page.markdown_table(CHECK_HEADER, check_rows(found)), ""]
    return "\n".join([*parts, *(f"- {r.render()}" for r in found.recommendations.values())])


def render_html(found: TuneResult) -> str:
    parts = [f"<h1>{TITLE}</h1>", page.paragraph(lead(found), soft=True)]
    for r in found.recommendations.values():
        answer = "no-go" if r.shape is None else "go" if r.best.speedup.low > 1.0 else "open"
        parts.append(page.verdict_box(answer, f"Batch {r.batch}: {r.choice}", r.reason[:1].upper() + r.reason[1:]))
    cells = [
        (f"Predicted speed-up, batch {b}", "by beams and draft length", grid_heat_map(found.predictions, b))
        for b in sorted({p.batch for p in found.predictions})
    ]
    cells.append(("One user against all", "each point a setting", user_against_total(found.predictions)))
    parts += [page.plots(cells)]
    if found.checks:
        parts += [page.heading("Predicted and measured"), page.table(CHECK_HEADER, check_rows(found))]
    parts += [page.heading("All settings"), page.table(HEADER, rows(found))]
    return page.page(TITLE, parts)


def tuned_recipe(values: Mapping[str, Any], found: TuneResult) -> str:
    """The recipe with the shape for the smallest batch size at which one pays, and the others as comments.

    For another GPU, the engine's batch is limited to sizes at which that shape is predicted to pay; its token limits
    are derived from that and from the shape when it is built.
    """
    chosen = list(found.recommendations.values())
    comments = ["# Draft shape chosen by `trtllm-redrafter tune`.", *(f"# {r.render()}" for r in chosen)]
    comments += [
        f"# batch {limit['batch']}, {limit['setting']}: the engine's max_num_tokens is {limit['max_num_tokens']}"
        for limit in found.facts.get("engine_limits", [])
    ]
    paying = [r for r in chosen if r.shape is not None]
    changed: dict[str, Any] = {key: dict(v) if isinstance(v, Mapping) else v for key, v in values.items()}
    if paying:
        shape = paying[0].shape
        assert shape is not None
        section = changed["convert"] = dict(changed.get("convert") or {})
        section["num_beams"], section["draft_len"] = shape.num_beams, shape.draft_len
        if isinstance(changed.get("run"), dict):  # what it says would hide the choice
            changed["run"] = {k: v for k, v in changed["run"].items() if k not in ("num_beams", "draft_len")}
        if found.target != THIS:
            build = changed["build"] = dict(changed.get("build") or {})
            build["max_batch_size"] = max(
                p.batch for p in found.predictions if p.shape == shape and p.speedup.value > 1.0
            )
            changed["tensorrt_llm"] = {**(changed.get("tensorrt_llm") or {}), "gpu": found.target}
    else:
        changed.pop("drafter", None)
        comments.append("# No setting pays: the drafter is left out.")
    return "\n".join(comments) + "\n" + yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)


def write_tune_report(found: TuneResult, folder: Path, recipe: Mapping[str, Any], *, overwrite: bool) -> None:
    with atomic_directory(folder, overwrite=overwrite) as work:
        write_json(work / "tune.json", without_nan({"kind": "tuning", "schema": 1, **found.as_dict()}))
        (work / "tune.md").write_text(f"# {TITLE}\n\n{render_text(found)}\n", encoding="utf-8")
        (work / "tune.html").write_text(render_html(found), encoding="utf-8")
        (work / "recipe.yaml").write_text(tuned_recipe(recipe, found), encoding="utf-8")
        write_json(work / "manifest.json", {"kind": "report", "creator": {"name": CREATOR}})


def settings_flags(found: TuneResult) -> Sequence[str]:
    """How to use the choice without the written recipe."""
    return [
        f"--set convert.num_beams={r.shape.num_beams} --set convert.draft_len={r.shape.draft_len}   # batch {r.batch}"
        for r in found.recommendations.values()
        if r.shape is not None
    ]
