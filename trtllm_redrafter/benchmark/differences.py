"""Why do two greedy texts differ that should be equal: rounding between two nearly equal tokens, or a fault?

In 16 bits, many rows computed together can round differently from a single row. Two tokens whose logits differ by less
than that may then swap places; both texts are greedy texts of the model. A larger difference is a fault, and so is any
difference on a row-invariant executor, whose rows do not depend on the rest of the batch.

    examine(runner, item, drafted, plain, batch, alike=True).kind      # "tie", "fault" or "unexamined"
"""

from __future__ import annotations

from collections.abc import Sequence

from trtllm_redrafter.backends.base import Runner
from trtllm_redrafter.benchmark.prompts import Item
from trtllm_redrafter.benchmark.records import Difference
from trtllm_redrafter.verify.token_checks import gap, tie_bound

TIE, FAULT, UNEXAMINED = "tie", "fault", "unexamined"


def examine(
    runner: Runner, item: Item, drafted: Sequence[int], plain: Sequence[int], batch: int, *, alike: bool
) -> Difference:
    """Find the first difference and its cause. `alike`: the same executor wrote both texts.

    The runner must be idle. Only the torch backend returns logits.
    """
    position = next((i for i, (a, b) in enumerate(zip(drafted, plain, strict=False)) if a != b), None)
    if position is None:  # one text ends where the other goes on
        return Difference(item.item_id, batch, min(len(drafted), len(plain)), FAULT, None, None)
    measured = _gap(runner, (*item.token_ids, *plain[:position]), drafted[position], plain[position])
    if measured is None:
        return Difference(item.item_id, batch, position, UNEXAMINED, None, None)
    apart, bound, invariant = measured
    kind = TIE if apart <= bound and not (invariant and alike) else FAULT
    return Difference(item.item_id, batch, position, kind, apart, bound)


def _gap(runner: Runner, context: tuple[int, ...], one: int, other: int) -> tuple[float, float, bool] | None:
    """Difference of the two tokens' logits, the bound for rounding, and whether the executor is row-invariant."""
    import torch

    from trtllm_redrafter.backends.torch.runner import TorchRunner

    if not isinstance(runner, TorchRunner):
        return None
    with torch.no_grad():
        logits = runner.executor.prefill(0, context).logits.float()
    return abs(gap(logits, one, other)), tie_bound(logits, runner.info.dtype), runner.executor.row_invariant
