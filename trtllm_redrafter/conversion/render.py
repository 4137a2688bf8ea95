"""A conversion plan as text for people and as a dict for programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm_redrafter.conversion.plan import ConversionPlan


def human_bytes(count: int) -> str:
    """`269.1 MB`; powers of ten, as disks are sold."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def render_plan(plan: ConversionPlan) -> str:
    """Reads, writes, derived values, notes."""
    options = plan.options
    read = sum(path.stat().st_size for path in plan.inputs)
    lines = [
        f"convert to {options.output}",
        f"  base      {options.base} ({plan.base.kind}): {plan.config.parameters_hint}",
    ]
    if plan.drafter is not None:
        d = plan.drafter.config
        kind = "RNN" if d.rnn else "no RNN"
        lines.append(
            f"  drafter   {plan.drafter.path}: {d.num_layers} layers, exit_dim {d.exit_dim}, {kind}"
            + (", LM head from the base" if plan.drafter.tie_lm_head else "")
        )
    lines.append(f"  reads     {len(plan.inputs)} files, {human_bytes(read)}")
    lines += [
        f"  writes    rank{rank.rank}.safetensors, {len(rank.tensors)} tensors, {human_bytes(rank.layout.file_size)}"
        for rank in plan.ranks
    ]
    lines += [f"  copies    {target}" for _, target in plan.copies]
    lines.append("  derived")
    width = max(len(key) for key in plan.derived)
    lines += [f"    {key:<{width}}  {value}" for key, value in plan.derived.items()]
    lines += [f"  note      {note}" for note in plan.notes]
    return "\n".join(lines)


def plan_dict(plan: ConversionPlan) -> dict[str, Any]:
    return {
        "options": plan.options.as_dict(),
        "reads": [_file(path) for path in plan.inputs],
        "writes": [
            {"file": f"rank{r.rank}.safetensors", "tensors": len(r.tensors), "bytes": r.layout.file_size}
            for r in plan.ranks
        ],
        "copies": [{"from": str(source), "to": target} for source, target in plan.copies],
        "config": plan.config.to_dict(),
        "derived": plan.derived,
        "notes": list(plan.notes),
    }


def _file(path: Path) -> dict[str, Any]:
    return {"file": str(path), "bytes": path.stat().st_size}
