"""The training loop: AdamW over windows of cached rows; the base model itself never runs here.

What a step does depends on (options, step) alone: which windows, which learning rate. So a resumed run repeats the
interrupted one exactly, losses included, and only the weights and AdamW's two moments are kept in between (as
safetensors; no pickles). Under `torchrun` every process takes its share of a step's windows and the gradients are
averaged; a single process does none of that.

    trainer = Trainer(model, rows, BaseTensors(embedding, head, loss_vocab), options)
    trainer.run(log, progress)                  # learning rates are options.rate_at(step)
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist

from trtllm_redrafter.checkpoint.safetensors_io import save_tensors
from trtllm_redrafter.errors import InputError, NumericalError
from trtllm_redrafter.progress import Progress
from trtllm_redrafter.training.loss import LossOptions, LossResult, count_targets, distillation_loss
from trtllm_redrafter.training.model import TrainableDrafter
from trtllm_redrafter.training.rows import TrainingRows, WindowOrder, cut_targets, cut_windows


@dataclass(frozen=True)
class FitOptions:
    """How to train. `window` rows x `windows` make a step's batch, in `accumulation` parts.

    Of each part's windows, `full_windows` take their loss over the whole vocabulary and the others over
    `BaseTensors.loss_vocab` alone, with the teacher renormalised on it: a quarter of the work for the tokens that
    nearly all text is made of, while the rest still learn to stay low.
    """

    loss: LossOptions
    max_steps: int
    window: int
    windows: int
    full_windows: int
    accumulation: int
    learning_rate: float
    final_lr_ratio: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    clip_norm: float
    autocast: bool
    seed: int
    log_every: int

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, then down to the final ratio at the last step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        if self.schedule == "constant":
            return self.learning_rate
        fall = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.learning_rate * (self.final_lr_ratio + (1 - self.final_lr_ratio) * fall)


@dataclass(frozen=True)
class BaseTensors:
    """What training needs of the base model: input embedding [V, H] and LM head [V, H] (the same tensor when tied).

    `loss_vocab` [R] holds the token ids that most windows' losses are restricted to (see `FitOptions.full_windows`).
    """

    embedding: Tensor
    head: Tensor
    loss_vocab: Tensor


@dataclass(frozen=True)
class StepLog:
    """One line of the metrics file."""

    step: int
    loss: float
    per_position: list[float]
    learning_rate: float
    gradient_norm: float
    rows_per_second: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "loss": round(self.loss, 6),
            "per_position": [round(x, 6) for x in self.per_position],
            "learning_rate": self.learning_rate,
            "gradient_norm": round(self.gradient_norm, 4),
            "rows_per_second": round(self.rows_per_second, 1),
        }


class Trainer:
    """Model, optimizer and position in the run. `run()` goes to the end, or to `until`."""

    def __init__(self, model: TrainableDrafter, rows: TrainingRows, base: BaseTensors, options: FitOptions) -> None:
        self.model, self.rows, self.base, self.options = model, rows, base, options
        self.step = 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._fused = base.head.is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(options.beta1, options.beta2), fused=self._fused)
        self._restricted = restricted = base.loss_vocab.to(base.head.device)
        self._small_head = base.head[restricted].contiguous()
        self._column = torch.full((base.head.shape[0],), -1, device=base.head.device)
        self._column[restricted] = torch.arange(len(restricted), device=base.head.device)
        self.order = WindowOrder(len(rows), options.window, options.windows * self.world, options.seed)

    def run(
        self, log: Callable[[StepLog], None], progress: Progress, *, until: int | None = None, drop_first: int = 0
    ) -> None:
        """Train to step `until` (default: all). `drop_first` leaves that many steps out of the speed figures."""
        last = self.options.max_steps if until is None else min(until, self.options.max_steps)
        first, started, begin = self.step, time.perf_counter(), self.step + drop_first
        while self.step < last:
            result, norm, rate = self.advance()
            if self.step == begin and drop_first:
                first, started = self.step, _now(self.base.head)
            if self.step % self.options.log_every == 0 or self.step == last:
                rows = (self.step - first) * self.options.windows * self.options.window * self.world
                speed = rows / max(1e-9, _now(self.base.head) - started)
                self._check(float(result.total), float(norm))
                log(StepLog(self.step, float(result.total), result.per_position.tolist(), rate, float(norm), speed))
                progress("train", self.step, self.options.max_steps, "steps")

    def _check(self, loss: float, norm: float) -> None:
        """`NumericalError` if a logged number is not finite. Logging comes before saving: no broken state is kept."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericalError(
                f"training diverged: at step {self.step} the loss is {loss:g}, its gradient's norm {norm:g}",
                why="the learning rate is too high, or the base model's weights or hidden states are extreme",
                remedy="lower train.learning_rate, or compute the base model in bfloat16; resume from the last save",
            )

    def advance(self) -> tuple[LossResult, Tensor, float]:
        """One optimizer step: its mean loss, the gradient's norm before clipping, the learning rate."""
        rate = self.options.rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = self.order.starts(self.step)[self.rank :: self.world].chunk(self.options.accumulation)
        counts = torch.stack([self._count(part) for part in parts]).sum(dim=0)
        self._add_up(counts)
        results = []
        for part in parts:  # each is divided by the whole step's targets: the parts add up to its mean
            result = self.loss(part, counts)
            result.total.backward()  # type: ignore[no-untyped-call]
            results.append(result)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                self._add_up(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        total = torch.stack([r.total.detach() for r in results]).sum()
        per_position = torch.stack([r.per_position for r in results]).sum(dim=0)
        self._add_up(total)
        self._add_up(per_position)
        return LossResult(total, per_position), norm, rate

    def _add_up(self, tensor: Tensor) -> None:
        """Sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)

    def _count(self, starts: Tensor) -> Tensor:
        """Targets per position of the windows that see the whole vocabulary, and of the others. [2, L]"""
        tokens, valid = cut_targets(self.rows, starts, self.options.window, self.model.spec.draft_len)
        tokens, valid = tokens.to(self.base.head.device), valid.to(self.base.head.device)
        full = self.options.full_windows
        known = valid[full:] & self._known(self._column[tokens[full:]])
        return torch.stack([count_targets(valid[:full]), count_targets(known)])

    def _known(self, column: Tensor) -> Tensor:
        """Is the token j rows ahead in the restricted vocabulary? [W, S + L] -> [W, L, S]"""
        window = self.options.window
        ahead = range(1, self.model.spec.draft_len + 1)
        return torch.stack([column[:, j : j + window] >= 0 for j in ahead], dim=1)

    def loss(self, starts: Tensor, counts: Tensor | None = None) -> LossResult:
        """Loss of the windows beginning at `starts`; `counts` as `_count` gives it, of the whole step."""
        counts = self._count(starts) if counts is None else counts
        own, dtype = self.base.head, self.base.head.dtype
        batch = cut_windows(self.rows, starts, self.options.window, self.model.spec.draft_len)
        hidden, tokens = batch.hidden.to(own.device, dtype), batch.tokens.to(own.device)
        valid = batch.valid.to(own.device)
        features, head = self._features(hidden, tokens), self.model.head_of(own)
        full = min(self.options.full_windows, len(starts))
        parts = []
        if full > 0:
            seen = features[:full], head, hidden[:full], own, tokens[:full], valid[:full]
            parts.append((full / len(starts), distillation_loss(*seen, self.options.loss, counts[0])))
        if full < len(starts):  # a token outside `loss_vocab` teaches nothing here
            small = self._small_head if head is own else head[self._restricted]
            column = self._column[tokens[full:]]
            known = valid[full:] & self._known(column)
            seen = features[full:], small, hidden[full:], self._small_head, column, known
            parts.append((1 - full / len(starts), distillation_loss(*seen, self.options.loss, counts[1])))
        total = torch.stack([share * part.total for share, part in parts]).sum()
        return LossResult(total, torch.stack([share * part.per_position for share, part in parts]).sum(dim=0))

    def _features(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The drafter over the windows, in its own float32 or under autocast; handed on in the base's dtype."""
        context, following = hidden[:, : self.options.window], self.base.embedding[tokens]
        with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=self.options.autocast):
            features: Tensor = self.model(context.float(), following.float())
        return features.to(hidden.dtype)

    def save(self, path: Path) -> None:
        """Weights, moments and the step in one file, by rename."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{key}"] = value
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_tensors(path, tensors, {"step": str(self.step), "run": json.dumps(self._run)})

    @property
    def _run(self) -> list[str]:
        """What must be the same for a resumed run to repeat this one."""
        return [repr(self.model.spec), repr(self.options), f"{len(self.rows)} rows, {self.world} processes"]

    def load(self, path: Path) -> None:
        """Continue where `save` was called; everything must be the same, or the rest would be another run."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            tensors, run = load_file(path), json.loads(metadata["run"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                "is no training state", where=path, why=str(error), remedy="remove it and train from the start"
            ) from error
        if run != self._run:
            there, here = next((a, b) for a, b in zip(run, self._run, strict=True) if a != b)
            raise InputError(
                "was saved by a run with other options",
                where=path,
                why=f"there {there}, here {here}",
                remedy="resume with the options it began with, or start over in another work directory",
            )
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
                prefix = f"adam.{name}."
                moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                self.optimizer.state[parameter] = {
                    # AdamW's step counter stays on the CPU unless its kernels are fused.
                    key: value.to(parameter.device) if key != "step" or self._fused else value
                    for key, value in moments.items()
                }
        self.step = int(metadata["step"])


def _now(tensor: Tensor) -> float:
    """Wall clock once the device has done all it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
