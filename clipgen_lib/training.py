"""Pure functions of the step: the learning rate and which rows a batch holds."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import FitConfig, OptimConfig
from .runtime import distributed
from .runtime.checkpoints import checkpoint_meta, load_checkpoint, save_checkpoint, save_weights
from .runtime.kernels import apply
from .runtime.runs import ClipgenError, Run, differences, progress, stoppable
from .vqgan import code_use, token_counts


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.02) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to `floor * peak` (arXiv 1608.03983)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


KEPT = 2  # last checkpoints of a training; the one with the best score on held-out images stays as well
MOST_SKIPPED = 10  # steps in a row without a finite loss and gradient that end a training


def accelerator_on(config: OptimConfig, device: str) -> Accelerator:
    """An Accelerator on the asked device; its precision may differ from that of an earlier one in this process."""
    on_cpu = device == "cpu"
    if config.precision == "fp16" and on_cpu:
        raise ClipgenError("precision fp16 needs a GPU: choose bf16 or no in the preset")
    AcceleratorState._reset_state()  # a second training in one notebook would otherwise be refused another precision
    distributed.join(device)
    return Accelerator(mixed_precision=config.precision, cpu=on_cpu)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether parameters are spread over the processes by FSDP, as Accelerate's config says."""
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if is_fsdp and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ClipgenError(
            "FSDP of version 1 flattens parameters, which Muon and the EMA need whole: set fsdp_version to 2 in Accelerate's config"
        )
    return is_fsdp


def scaler_of(accelerator: Accelerator) -> dict:
    """The loss scale of fp16, which moves on its own and has to be resumed."""
    return {"scaler": accelerator.scaler} if accelerator.scaler is not None else {}


def scale_of(accelerator: Accelerator) -> torch.Tensor | float:
    """What fp16 multiplies losses by, so that small gradients are not lost; asked for without waiting for the GPU."""
    return 1.0 if accelerator.scaler is None else accelerator.scaler.scale(torch.ones((), device=accelerator.device))


def lasting(config: OptimConfig) -> dict:
    """The fields that a resumed run must share; logging, workers and compilation may change between sessions."""
    return {k: v for k, v in asdict(config).items() if k not in ("log_every", "save_every", "workers", "compile")}


def step_seed(seed: int, step: int, rank: int | None = None) -> int:
    """A seed for the global generator at one step on one process, or (None) for what all processes draw alike.

    Seeded anew at every step, nothing random has a state to keep: a run that is resumed, with whatever number of processes,
    draws what it would have drawn.
    """
    words = [seed, 17, step] + ([] if rank is None else [rank])
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def positions(config: OptimConfig) -> np.ndarray:
    """Places in the whole batch that are this process's, (accumulate, n): one row for each backward pass."""
    shares = distributed.world_size() * config.accumulate
    if config.batch_size % shares:
        raise ClipgenError(
            f"batch_size {config.batch_size} does not divide by {distributed.world_size()} processes times accumulate {config.accumulate}: change one of them"
        )
    return np.arange(config.batch_size).reshape(distributed.world_size(), config.accumulate, -1)[distributed.rank()]


def spread(size: int, share: float) -> np.ndarray:
    """Marks, (size,) bool, at that share of the places, at least one, evenly apart: every process has its part of them."""
    count = max(1, round(share * size))
    marked = np.zeros(size, bool)
    marked[((np.arange(count) + 0.5) * size / count).astype(int)] = True
    return marked


def with_last(parts: Sequence) -> Iterator[tuple[bool, object]]:
    """Each part, and whether it is the last."""
    return ((i + 1 == len(parts), part) for i, part in enumerate(parts))


@contextmanager
def reduced(accelerator: Accelerator, last: bool, *modules: nn.Module) -> Iterator[None]:
    """Gradients go between processes with the last part of a batch only."""
    with ExitStack() as stack:
        for module in () if last else modules:
            stack.enter_context(accelerator.no_sync(module))
        yield


def set_learning_rates(optimizers: list, peaks: tuple[float, ...], step: int, config: OptimConfig) -> None:
    for optimizer, peak in zip(optimizers, peaks, strict=True):
        set_learning_rate(optimizer, learning_rate(step, config.steps, peak, config.warmup))


def finish(
    run: Run, stage: str, module: nn.Module, accelerator: Accelerator, skipped: dict, **facts: object
) -> nn.Module:
    """Write the weights, tell of skipped files and steps, and hand back the model for use."""
    distributed.barrier()
    if accelerator.is_main_process:
        save_weights(run.path / stage, module, **facts)
        steps = sum(line.get("skipped", 0) for line in run.metrics(stage))
        run.add_to_summary(
            parameters={stage: sum(p.numel() for p in module.parameters())},
            **({"skipped": skipped} if skipped else {}),
            **({"skipped_steps": {stage: steps}} if steps else {}),
        )
    distributed.barrier()
    return module.eval().requires_grad_(False)


class Averaged:
    """The exponential moving average of a module's parameters; its buffers are copied."""

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.updates = copy.deepcopy(module).requires_grad_(False), decay, 0
        self.parameters = list(self.module.parameters())

    def follow(self, module: nn.Module) -> None:
        """Cut the average into the shards of a module that FSDP has cut."""
        self.parameters = [
            distribute_tensor(own, p.device_mesh, p.placements) if isinstance(p, DTensor) else own
            for own, p in zip(self.parameters, module.parameters(), strict=True)
        ]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """After an optimiser step; the first one is taken as it is."""
        news = [p.detach() for p in module.parameters()]
        if self.updates == 0:
            torch._foreach_copy_(self.parameters, news)
        else:
            torch._foreach_lerp_(self.parameters, news, 1 - self.decay)
        for own, new in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(new)
        self.updates += 1

    @torch.no_grad()
    def whole(self) -> nn.Module:
        """The module with the averages; where they are sharded every process has to ask."""
        for own, average in zip(self.module.parameters(), self.parameters, strict=True):
            if own is not average:
                own.copy_(whole(average))
        return self.module

    def state_dict(self) -> dict:
        return {"updates": self.updates, "module": self.whole().state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.module.load_state_dict(state["module"])


def whole(node: object) -> object:
    """A nested state with every sharded tensor (FSDP) put together; every process has to ask."""
    if isinstance(node, DTensor):
        return node.full_tensor()
    if isinstance(node, dict):
        return {key: whole(value) for key, value in node.items()}
    return [whole(value) for value in node] if isinstance(node, list) else node


def load_whole(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimizer's whole state where its parameters are sharded, each tensor cut as its parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def cut(value: object, p: torch.Tensor) -> object:
        is_like = isinstance(p, DTensor) and isinstance(value, torch.Tensor) and value.shape == p.shape
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements) if is_like else value

    cuts = {i: {key: cut(value, parameters[i]) for key, value in entry.items()} for i, entry in state["state"].items()}
    optimizer.load_state_dict({**state, "state": cuts})


def checkpoints(run: Run, stage: str, best_first: bool = False) -> list[Path]:
    """The checkpoints of a stage in order of their steps; with `best_first` those that have a score, in order of it."""
    paths = sorted((run.path / "checkpoints").glob(f"{stage}-{'[0-9]' * 8}.safetensors"))
    if not best_first:
        return paths
    scores = {path: score for path in paths if (score := checkpoint_meta(path).get("score")) is not None}
    return sorted(scores, key=scores.get)


class TrainingState:
    """All that a training needs to go on, by name, in one file for each checkpoint: `checkpoints/<stage>-<step>.safetensors`.

    The last `KEPT` of them stay, and the one with the best score.
    """

    def __init__(self, run: Run, stage: str, parts: dict, facts: dict):
        self.run, self.stage, self.parts, self.facts = run, stage, parts, facts
        self.folder = run.file("checkpoints", stage).parent

    def save(self, step: int, score: float | None = None) -> None:
        """Write the state after `step` steps, by the first process; `score`, where there is one, is better the lower."""
        state = whole({name: part.state_dict() for name, part in self.parts.items()})
        if not distributed.is_main():
            return
        for cut in self.folder.glob(f".{self.stage}-*"):  # left by a process that was killed while it wrote
            cut.unlink()
        path = self.folder / f"{self.stage}-{step:08d}.safetensors"
        if not (score is None and path in checkpoints(self.run, self.stage)):
            score = score if score is not None and math.isfinite(score) else None
            save_checkpoint(path, state, {"training": self.facts, "step": step, "score": score})
        kept = checkpoints(self.run, self.stage)[-KEPT:] + checkpoints(self.run, self.stage, best_first=True)[:1]
        for path in checkpoints(self.run, self.stage):
            if path not in kept:
                path.unlink()

    def resume(self) -> int:
        """Load the last checkpoint that is whole; returns the step to go on from.

        Raises:
            ClipgenError: it belongs to another training, or none of those there is whole.
        """
        step, damaged = 0, {}
        for path in reversed(checkpoints(self.run, self.stage)):
            try:
                state, meta = load_checkpoint(path)
            except ClipgenError as error:
                damaged[path] = str(error)
                continue
            if differing := differences(meta["training"], self.facts):
                raise ClipgenError(
                    f"{path} belongs to another training (differs in {', '.join(differing)}): choose another run name or delete it"
                )
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            step = meta["step"]
            break
        if damaged and not step:
            raise ClipgenError(next(iter(damaged.values())))
        distributed.barrier()  # all have read what is about to change
        if distributed.is_main():
            for path, why in damaged.items():  # aside, or they would count among the last ones that are kept
                warnings.warn(
                    f"{why}; the training goes on from step {step}, that file is now {path.name}.damaged", stacklevel=3
                )
                path.rename(f"{path}.damaged")
            for stage in (self.stage, f"{self.stage}_held_out"):
                self.run.rewind(stage, step)
        return step


class Log:
    """Means of scalars since the last line, kept as tensors until then: no waiting for the GPU in between."""

    def __init__(self, run: Run, stage: str, steps: int, codebook_size: int = 0):
        self.run, self.stage, self.codebook_size, self.most = run, stage, codebook_size, min(MOST_SKIPPED, steps)
        self.scalars: dict[str, list[torch.Tensor]] = {}
        self.losses: list[torch.Tensor] = []  # of this step
        self.counts: torch.Tensor | int = 0
        self.skipped: list[torch.Tensor] = []  # of the steps since the last line
        self.in_a_row = 0

    def add(self, **scalars: torch.Tensor) -> None:
        for key, value in scalars.items():
            self.scalars.setdefault(key, []).append(value.detach().float())
        if "loss" in scalars:
            self.losses.append(self.scalars["loss"][-1])

    def use(self, tokens: torch.Tensor) -> None:
        """Count the codes of a batch."""
        self.counts = self.counts + token_counts(tokens, self.codebook_size)

    def valid(self, *norms: torch.Tensor) -> torch.Tensor:
        """Whether this step's losses and gradients are finite on every process, () bool; its answer is counted."""
        values = torch.stack(
            [distributed.all_reduce_mean(torch.stack(self.losses).sum()), *(norm.float() for norm in norms)]
        )
        self.losses = []
        self.skipped.append(~values.isfinite().all())
        return ~self.skipped[-1]

    def write(self, step: int, **extra: float) -> dict[str, str]:
        """Log the means over processes and steps (what is not finite left out) and clear them; returns what the bar shows.

        Raises:
            ClipgenError: `MOST_SKIPPED` steps in a row had no finite loss or gradient.
        """
        values = {key: torch.stack(found) for key, found in self.scalars.items()}
        means = distributed.all_reduce_mean(torch.stack([x[x.isfinite()].mean() for x in values.values()])).tolist()
        line = dict(zip(values, means, strict=True))
        if self.codebook_size:
            line |= code_use(distributed.all_reduce_sum(self.counts))
            line["psnr"] = 10 * np.log10(4 / line["l2"])  # peak to peak is 2 in [-1, 1]
        skipped, self.scalars, self.counts, self.skipped = torch.stack(self.skipped).tolist(), {}, 0, []
        if any(skipped):
            line["skipped"] = sum(skipped)
        if distributed.is_main():
            self.run.log(self.stage, step, **line, **extra)
        for bad in skipped:
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if self.in_a_row == self.most:
                raise ClipgenError(
                    f"the {self.stage} loss or its gradient was not finite at {self.most} steps in a row before step {step}: the weights are those of before and in the last checkpoint; look at the data and the precision, or begin another run with a lower learning rate"
                )
        shown = ("psnr", "perplexity", "nll", "embedding_loss", "loss")
        return {key: f"{line[key]:.3g}" for key in shown if key in line}


def fit(
    run: Run,
    stage: str,
    model: nn.Module,
    config: FitConfig,
    facts: dict,
    loss_of: Callable[[int], tuple[torch.Tensor, dict]],
    clip_norm: float = 0.0,
    after_step: Callable[[], None] = lambda: None,
    show_progress: bool = True,
) -> None:
    """Train CLIP or the classifier on one device with AdamW, or go on from a checkpoint of the same `facts`.

    Args:
        loss_of: step -> its loss, and scalars to log beside it; a function of seed and step, so that resuming is exact.
        clip_norm: of the gradient; 0 leaves it as it is.
    """
    optimizer = build_optimizer(model, "adamw", config.lr, 0.98, config.weight_decay)
    state = TrainingState(run, stage, {"model": model, "optimizer": optimizer}, facts)
    start, log = state.resume(), Log(run, stage, config.steps)
    with progress(config.steps, f"training {stage}", show_progress, start) as bar, stoppable() as stop:
        model.train()
        for step in range(start + 1, config.steps + 1):
            rate = learning_rate(step - 1, config.steps, config.lr, config.warmup)
            set_learning_rate(optimizer, rate)
            loss, scalars = loss_of(step - 1)
            loss.backward()
            gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or math.inf)
            log.add(loss=loss, gradient=gradient, **scalars)
            apply([optimizer], log.valid(gradient))
            after_step()
            bar.update()
            if step % config.log_every == 0 or step == config.steps:
                bar.set_postfix(log.write(step, lr=rate))
            if step % config.save_every == 0 or step == config.steps:
                state.save(step)
            stop.raise_if_asked(lambda done=step: state.save(done), f"after step {step} of the {stage} training")


# Layers that read or write something other than features; an orthogonal update there means nothing (as in the first
# description of Muon, kellerjordan.github.io/posts/muon, embeddings and heads stay with AdamW).
_OUTER_LAYERS = ("conv_in", "conv_out", "quant_conv", "embedding", "condition", "modulation", "head")
_NEVER_DECAYED = ("codebook", "positions", "prefix")


def build_optimizer(
    module: nn.Module, kind: str, lr: float, beta2: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), or Muon on the hidden layers and Nesterov AdamW on the rest.

    Muon (here timm's) replaces the momentum of a matrix or kernel by the nearest orthogonal matrix; scaled to AdamW's
    root mean square (arXiv 2502.16982) it shares AdamW's learning rate. Matrices and kernels decay; biases, norms,
    positions and the codebook do not.

    Raises:
        ClipgenError: unknown kind.
    """
    groups: dict[str, list[nn.Parameter]] = {"hidden": [], "outer": [], "undecayed": []}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or any(part in name for part in _NEVER_DECAYED):
            groups["undecayed"].append(parameter)
        else:
            groups["outer" if any(part in name for part in _OUTER_LAYERS) else "hidden"].append(parameter)
    decays = {"hidden": weight_decay, "outer": weight_decay, "undecayed": 0.0}
    settings = {key: {"params": groups[key], "weight_decay": decay} for key, decay in decays.items() if groups[key]}
    if kind == "adamw":
        return torch.optim.AdamW(settings.values(), lr=lr, betas=(0.9, beta2), fused=True)
    if kind == "muon":
        from timm.optim import Muon

        settings = [{**group, "use_fallback": key != "hidden"} for key, group in settings.items()]
        return Muon(
            settings,
            lr=lr,
            betas=(0.9, beta2),
            adjust_lr_fn="match_rms_adamw",
            ns_steps=3,
            ns_coefficients="polar_express",
        )
    raise ClipgenError(f"unknown optimizer {kind!r}: choose adamw or muon")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
