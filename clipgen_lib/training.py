"""What every training shares: learning rate, optimizer, EMA, the state that is saved and resumed, the log and the steps.

Whatever is random in a training is a function of seed and step, and the rest of its state is in the checkpoint, so that a
resumed run is the uninterrupted one. Several processes share each batch and come to the same weights as one, up to the order
of sums. A step without a finite loss and gradient changes no weight and is counted.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .config import FitConfig, OptimConfig
from .runtime import distributed
from .runtime.checkpoints import checkpoint_meta, load_checkpoint, save_checkpoint, save_weights
from .runtime.kernels import has_bf16
from .runtime.muon import Muon
from .runtime.runs import ClipgenError, Run, Unreadable, differences, progress, read_json, reason, stoppable
from .vqgan import codebook_statistics

STATE = 2  # the version of what a checkpoint holds: those of an optimizer with other groups are refused
KEPT = 2  # last checkpoints of a training; the one with the best validation score stays as well
MOST_SKIPPED = 10  # steps in a row without a finite loss and gradient that end a training
PASSING = ("log_every", "save_every", "workers", "compile")  # fields of a config that may change when a run is resumed


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.02) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to `floor * peak` (arXiv 1608.03983)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def step_seed(seed: int, step: int, rank: int | None = None) -> int:
    """A seed for one step on one process, or (None) for what is the same on all processes."""
    words = [seed, 17, step, 0 if rank is None else rank + 1]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def local_rows(config: OptimConfig) -> np.ndarray:
    """Places in the whole batch that are this process's, (accumulate, n): a row for each backward pass.

    Raises ClipgenError: the batch does not divide.
    """
    size, world, accumulate = config.batch_size, distributed.world_size(), config.accumulate
    if size % (world * accumulate):
        shares = f"{world} processes times accumulate {accumulate}"
        raise ClipgenError(f"batch_size {size} does not divide by {shares}: change one of them")
    return np.arange(size).reshape(world, accumulate, -1)[distributed.rank()]


def autocast(config: OptimConfig | FitConfig, device: torch.device) -> torch.autocast:
    """bfloat16 where the config asks for it and the device computes in it, else float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16" and has_bf16(device))


# Layers that read or write something other than features; an orthogonal update there means nothing (as in the first
# description of Muon, kellerjordan.github.io/posts/muon, embeddings and heads stay with AdamW).
_OUTER_LAYERS = ("conv_in", "conv_out", "quant_conv", "embedding", "condition", "modulation", "head")
_NEVER_DECAYED = ("codebook", "positions", "start_tokens")


def build_optimizer(module: nn.Module, kind: str, lr: float, beta2: float, weight_decay: float) -> Optimizer:
    """AdamW (arXiv 1711.05101), or Muon on the hidden layers and AdamW on the rest.

    Matrices and kernels decay; biases, norms, positions and the codebook do not. Raises ClipgenError: unknown kind.
    """
    groups: dict[str, list[nn.Parameter]] = {"hidden": [], "qkv": [], "outer": [], "undecayed": []}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or any(part in name for part in _NEVER_DECAYED):
            groups["undecayed"].append(parameter)
        elif any(part in name for part in _OUTER_LAYERS):
            groups["outer"].append(parameter)
        else:
            groups["qkv" if "qkv" in name else "hidden"].append(parameter)
    parts = {"hidden": 1, "qkv": 3, "outer": 0, "undecayed": 0}
    settings = [
        {"params": found, "weight_decay": 0.0 if key == "undecayed" else weight_decay, "parts": parts[key]}
        for key, found in groups.items()
        if found
    ]
    if kind == "adamw":
        return torch.optim.AdamW(settings, lr=lr, betas=(0.9, beta2), fused=True)
    if kind == "muon":
        return Muon(settings, lr, (0.9, beta2))
    raise ClipgenError(f"unknown optimizer {kind!r}: choose adamw or muon")


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a module's parameters, in eval mode; its buffers, and the first update, are copied."""
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False).eval()


def named_step(step: Callable, default: Callable) -> dict[str, str]:
    """What tells a step function that is not the library's from others: its name and a hash of its code."""
    if step is default:
        return {}
    if not hasattr(step, "__code__"):
        raise ClipgenError(f"step_of is a {type(step).__name__}, of which no code can be told: give a plain function")
    code, names = step.__code__, step.__code__.co_names
    text = repr([code.co_code, names, [c for c in code.co_consts if not hasattr(c, "co_code")], step.__defaults__])
    return {"step_of": f"{step.__qualname__} {hashlib.sha256(text.encode()).hexdigest()[:8]}"}


def checked_step(found: tuple) -> tuple:
    """What a step function has returned, first a loss with its gradient and a dict of scalars. Raises ClipgenError: anything else."""
    loss, scalars = found[:2] if isinstance(found, tuple) and len(found) > 1 else (None, None)
    is_loss = isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad
    if not is_loss or not isinstance(scalars, dict) or not isinstance(scalars.get("loss"), torch.Tensor):
        needed = "first the loss, one number with its gradient, and a dict of scalars with `loss` among them"
        raise ClipgenError(f"step_of returned something else than the library's step: let it return {needed}")
    return found


class TrainingState:
    """All that a training needs to resume, by name, in one file for each checkpoint: `checkpoints/<stage>-<step>.safetensors`.

    The last `KEPT` of them stay, and the one with the best score.
    """

    def __init__(self, run: Run, stage: str, config: OptimConfig | FitConfig, parts: dict, facts: dict):
        """`parts` have a state_dict each; a checkpoint with other `facts`, config or seed is refused."""
        self.run, self.stage, self.config, self.parts = run, stage, config, parts
        lasting = {key: value for key, value in asdict(config).items() if key not in PASSING}
        self.facts = {**facts, "train": lasting, "seed": run.seed, "version": STATE}
        self.folder = run.file("checkpoints", stage).parent

    def paths(self) -> list[Path]:
        """The checkpoints in order of their steps."""
        return sorted(self.folder.glob(f"{self.stage}-{'[0-9]' * 8}.safetensors"))

    def save(self, step: int, score: float | None = None) -> None:
        """Write the state after `step` > 0 steps, by the first process; a lower `score` is better, None is no score."""
        if step == 0 or not distributed.is_main():
            return
        path = self.folder / f"{self.stage}-{step:08d}.safetensors"
        if score is not None or not path.exists():
            score = score if score is not None and math.isfinite(score) else None
            state = {name: part.state_dict() for name, part in self.parts.items()}
            save_checkpoint(path, state, {"training": self.facts, "step": step, "score": score})
        paths = self.paths()
        scores = {path: score for path in paths if (score := checkpoint_meta(path).get("score")) is not None}
        for path in paths[:-KEPT]:
            if path != min(scores, key=scores.get, default=None):
                path.unlink()

    def resume(self) -> int:
        """Load the last checkpoint that is whole; returns the step to resume from.

        Raises ClipgenError: it belongs to another training, cannot be read now, or none of those there is whole.
        """
        step, damaged = 0, {}
        for path in reversed(self.paths()):
            try:
                state, meta = load_checkpoint(path)
            except Unreadable:
                raise
            except ClipgenError as error:
                damaged[path] = str(error)
                continue
            if differing := ", ".join(differences(meta["training"], self.facts)):
                other = f"{path} belongs to another training (differs in {differing})"
                raise ClipgenError(f"{other}: choose another run name or delete it")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            step = meta["step"]
            break
        if damaged and not step:
            raise ClipgenError(next(iter(damaged.values())))
        distributed.barrier()  # all have read what is about to change
        if distributed.is_main():
            for path, why in damaged.items():  # aside, or they would count among the last ones that are kept
                warnings.warn(f"{why}; training resumes from step {step}, the file is set aside", stacklevel=3)
                path.rename(f"{path}.damaged")
            for stage in (self.stage, f"{self.stage}_val"):
                self.run.rewind(stage, step)
        return step


def chosen_tracker() -> str:
    """What CLIPGEN_TRACKER names: tensorboard, wandb, mlflow, ..., "" for none. Raises ClipgenError: Accelerate finds no such one."""
    if name := os.environ.get("CLIPGEN_TRACKER", ""):
        from accelerate.tracking import get_available_trackers

        if name not in (found := list(map(str, get_available_trackers()))):
            cure = f"install it by pip, or choose from what is installed ({', '.join(found) or 'none'})"
            raise ClipgenError(f"tracker {name!r} is not here, or not known to Accelerate: {cure}")
    return name


class Tracker:
    """One training in the chosen tracker, by the first process. An error in it is told once, and ends the tracking alone."""

    def __init__(self, run: Run, stage: str, start: int, facts: dict):
        """Resume from step `start`, or begin with the run's config and `facts` as hyper-parameters; files in `<run>/tracker/`."""
        self.name, self.tracker = chosen_tracker(), None
        if not self.name or not distributed.is_main():
            return
        from accelerate import Accelerator
        from pandas import json_normalize

        with self._told():
            config, database = run.path / "config.json", run.file("tracker", "mlflow.db").resolve()
            os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
            options = {"tensorboard": {"purge_step": start + 1}, "mlflow": {"run_name": run.name}}
            options["wandb"] = {"name": run.name, "dir": str(database.parent)}
            chosen = {"cpu": run.device == "cpu", "log_with": self.name, "project_dir": database.parent}
            accelerator = Accelerator(mixed_precision="no", **chosen)
            (values,) = json_normalize((read_json(config) if config.exists() else {}) | facts).to_dict("records")
            plain = {k: v if isinstance(v, (str, int, float)) else str(v) for k, v in values.items()}
            accelerator.init_trackers(f"clipgen-{stage}", None if start else plain, options)
            self.tracker = accelerator.get_tracker(self.name)

    def log(self, stage: str, step: int, scalars: dict[str, float], images: dict[str, np.ndarray | None]) -> None:
        """Scalars and, where Accelerate hands this tracker any, images (H, W, 3) uint8; what is not finite or None is left out."""
        layout = {"dataformats": "NHWC"} if self.name == "tensorboard" else {}
        with self._told():
            if self.tracker:
                self.tracker.log({f"{stage}/{k}": v for k, v in scalars.items() if math.isfinite(v)}, step=step)
            found = {f"{stage}/{key}": image[None] for key, image in images.items() if image is not None}
            if found and hasattr(self.tracker, "log_images"):
                self.tracker.log_images(found, step=step, **layout)

    def close(self) -> None:
        with self._told():
            if self.tracker:  # Accelerate's own end_training ends the launch as well
                self.tracker.finish()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each tracker has its own
            what = f"tracker {self.name} failed ({reason(error)})"
            warnings.warn(f"{what}: from here on this training is in metrics.jsonl alone", stacklevel=4)
            self.tracker = None


class Log:
    """Means of scalars since the last line, kept as tensors until then: no waiting for the GPU in between."""

    def __init__(self, run: Run, stage: str, steps: int):
        self.run, self.stage, self.most = run, stage, min(MOST_SKIPPED, steps)
        self.scalars: dict[str, list[torch.Tensor]] = {}
        self.counts: torch.Tensor | None = None  # of the codes used since the last line
        self.tracker: Tracker | None = None
        self.skipped, self.in_a_row = 0, 0  # steps that were not finite: since the last line, since the last that was

    def add(self, **scalars: torch.Tensor) -> None:
        for key, value in scalars.items():
            self.scalars.setdefault(key, []).append(torch.as_tensor(value).detach().float().mean())

    def count(self, tokens: torch.Tensor, codebook_size: int) -> None:
        """Count the codes of a batch, for codebook usage and perplexity."""
        counts = torch.bincount(tokens.flatten(), minlength=codebook_size)
        self.counts = counts if self.counts is None else self.counts + counts

    def write(self, step: int, **extra: float) -> dict[str, str]:
        """Log the means over processes and steps (what is not finite left out) and clear them; returns what the bar shows."""
        values = {key: torch.stack(found) for key, found in self.scalars.items()}
        means = distributed.all_reduce_mean(torch.stack([x[x.isfinite()].mean() for x in values.values()])).tolist()
        line = dict(zip(values, means, strict=True)) | extra
        if self.counts is not None:
            line |= codebook_statistics(distributed.all_reduce_sum(self.counts))
        if "l2" in line:
            line["psnr"] = 10 * math.log10(4 / line["l2"])  # in dB; peak to peak is 2 in [-1, 1]
        if self.skipped:
            line["skipped"] = self.skipped
        if distributed.is_main():
            self.line(self.stage, step, line)
        self.scalars, self.counts, self.skipped = {}, None, 0
        shown = ("psnr", "perplexity", "nll", "embedding_loss", "loss")
        return {key: f"{line[key]:.3g}" for key in shown if key in line}

    def line(self, stage: str, step: int, scalars: dict[str, float], **images: np.ndarray | None) -> None:
        """A line of metrics.jsonl, which a tracker gets as well, with images (H, W, 3) uint8."""
        self.run.log(stage, step, **scalars)
        if self.tracker:
            self.tracker.log(stage, step, scalars, images)


def optimizer_step(log: Log, step: int, max_grad_norm: float, **optimizers: Optimizer) -> bool:
    """Clip gradients, log their norms by these names, and step where they and the last loss are finite everywhere.

    Returns:
        Whether they were, on every process; the step is counted where not.

    Raises:
        ClipgenError: `MOST_SKIPPED` steps in a row were not.
    """
    for name, optimizer in optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        log.add(**{name: nn.utils.clip_grad_norm_(parameters, max_grad_norm)})
    values = torch.stack([log.scalars[name][-1] for name in ("loss", *optimizers)])
    finite = bool(distributed.all_reduce_mean(values).isfinite().all())
    log.skipped, log.in_a_row = log.skipped + (not finite), 0 if finite else log.in_a_row + 1
    if log.in_a_row == log.most:
        what = (
            f"the {log.stage} loss or its gradient was not finite at {log.most} steps in a row before step {step + 1}"
        )
        cure = "look at the data and the precision, or begin another run with a lower learning rate"
        raise ClipgenError(f"{what}: the weights are those of before and in the last checkpoint; {cure}")
    for optimizer in optimizers.values():
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    return finite


def loop(state: TrainingState, log: Log, start: int, validate: Callable = lambda step: None) -> Iterator[int]:
    """Yield the steps from `start` to the last; after each follow progress bar, log line, checkpoint and stop signal.

    Before each step the optimizers get their learning rates, whose peak is the one that each was built with, and the
    global generator is seeded, so that nothing random has a state to keep. To be wrapped in `contextlib.closing`: an
    error in the caller's loop then ends the bar and gives the signals back at once.

    Args:
        validate: called with the number of steps done before each checkpoint; returns its score, the lower the better.

    Raises:
        Stopped: SIGTERM or SIGINT, after a checkpoint.
    """
    config, stage = state.config, state.stage
    optimizers = [part for part in state.parts.values() if isinstance(part, Optimizer)]
    peaks = [(group, optimizer.defaults["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    bar = progress(config.steps, f"training {stage}", distributed.is_main(), start)
    with bar, closing(Tracker(state.run, stage, start, state.facts)) as log.tracker, stoppable() as stop:
        for step in range(start, config.steps):
            for group, peak in peaks:
                group["lr"] = learning_rate(step, config.steps, peak, config.warmup)
            torch.manual_seed(step_seed(state.run.seed, step, distributed.rank()))
            yield step
            done = step + 1
            bar.update()
            if done % config.log_every == 0 or done == config.steps:
                bar.set_postfix(log.write(done, lr=learning_rate(step, config.steps, config.lr, config.warmup)))
            if not distributed.is_main():
                continue
            if done % config.save_every == 0 or done == config.steps:
                state.save(done, validate(done))
            stop.raise_if_asked(lambda done=done: state.save(done), f"after step {done} of the {stage} training")


def finish(run: Run, stage: str, module: nn.Module, skipped: dict, **facts: object) -> nn.Module:
    """Write the weights, record skipped files and steps, and return the model for use."""
    distributed.barrier()
    if distributed.is_main():
        save_weights(run.path / stage, module, **facts)
        steps = sum(line.get("skipped", 0) for line in run.metrics(stage))
        run.add_to_summary(
            parameters={stage: sum(p.numel() for p in module.parameters())},
            **({"skipped": skipped} if skipped else {}),
            **({"skipped_steps": {stage: steps}} if steps else {}),
        )
    distributed.barrier()
    return module.eval().requires_grad_(False)


def fit(run: Run, stage: str, model: nn.Module, config: FitConfig, loss_of: Callable, facts: dict) -> None:
    """Train CLIP or the classifier on one device with AdamW, or resume from a checkpoint of the same `facts`.

    Args:
        loss_of: step -> its loss, and scalars to log beside it; a function of seed and step, so that resuming is exact.
    """
    optimizer = build_optimizer(model, "adamw", config.lr, 0.98, config.weight_decay)
    state = TrainingState(run, stage, config, {"model": model, "optimizer": optimizer}, facts)
    start, log = state.resume(), Log(run, stage, config.steps)
    model.train()
    with closing(loop(state, log, start)) as steps:
        for step in steps:
            loss, scalars = loss_of(step)
            loss.backward()
            log.add(loss=loss, **scalars)
            optimizer_step(log, step, max_grad_norm=1.0, gradient=optimizer)
