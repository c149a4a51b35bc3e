"""A training loop in this process that goes on where it was stopped: for models that are no layer of a mesh."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ...experts.errors import DataLoss, FailedPrecondition
from ...experts.training.optimizer_state import restore, state_of
from ...experts.weights.files import tensors_from_bytes, tensors_of, tensors_to_bytes
from ..machine.durable_files import write_private_bytes

SAVE_EVERY = 20.0
TELL_EVERY = 2.0
WARM_UP = 0.05
"""The share of the steps in which the learning rate rises; then it falls as half a cosine."""


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    checkpoint: Path,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
    tell: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Train a model with AdamW for so many steps, and return the seconds that it took; those before a resume count.

    `loss_of(step)` returns the loss of a batch, which depends on the step alone, so that a resumed training sees the
    same batches; torch's generator is seeded with each step for dropout. A `checkpoint` that is there is gone on from,
    a finished one at once. Raises DataLoss for one of another model, FailedPrecondition where the loss is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    first, spent = _restored(checkpoint, model, optimizer)
    began = saved = told = clock()
    model.train()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * factor_of(step, steps)
        torch.manual_seed(step)
        loss = loss_of(step)
        if not math.isfinite(float(loss.detach())):
            raise FailedPrecondition(f"the loss of {checkpoint.stem} is {float(loss.detach())} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        now = clock()
        if now - told > TELL_EVERY:
            left = (now - began) / (step + 1 - first) * (steps - step - 1)
            tell(f"{checkpoint.stem}: step {step + 1:,}/{steps:,}, loss {float(loss.detach()):.4f}, {left:.0f} s left")
            told = now
        if now - saved > SAVE_EVERY:
            _save(checkpoint, model, optimizer, step + 1, spent + now - began)
            saved = now
    if first < steps:
        spent += clock() - began
        _save(checkpoint, model, optimizer, steps, spent)
    model.eval()
    return spent


def factor_of(step: int, steps: int) -> float:
    """The learning rate of a step as a share of the highest."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    tensors, document = state_of(optimizer)
    tensors |= {f"model.{name}": tensor for name, tensor in tensors_of(model).items()}
    told = json.dumps({"optimizer": document, "step": step, "seconds": seconds})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private_bytes(path, tensors_to_bytes(tensors, {"fit": told}))


def _restored(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """The next step, and the seconds that were spent."""
    if not path.is_file():
        return 0, 0.0
    try:
        tensors, metadata = tensors_from_bytes(path.read_bytes())
        document = json.loads(metadata["fit"])
        own = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        model.load_state_dict(own)
        restore(optimizer, tensors, document["optimizer"])
        return int(document["step"]), float(document["seconds"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DataLoss(f"{path}: the checkpoint is of another model, or damaged; remove it: {error}") from None
