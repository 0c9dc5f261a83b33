"""The command line: all notebooks by papermill, or one stage at a time without a notebook.

Heavy modules are imported inside the commands: `clipgen --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from pathlib import Path

import click

from .config import PRESETS
from .runtime.runs import ROOT, ClipgenError, open_run

NOTEBOOKS = ("01_train_vqgan", "02_extract_tokens", "03_train_transformer", "04_evaluate")


class _Commands(click.Group):
    """Our own errors end a command with their sentence and exit status 1; anything else is a bug and shows."""

    def invoke(self, context: click.Context):
        from .runtime.distributed import together

        try:
            with together():
                return super().invoke(context)
        except ClipgenError as error:
            failed = click.ClickException(str(error))
            failed.exit_code = error.exit_code
            raise failed from None


@click.group(cls=_Commands)
@click.version_option(package_name="clipgen_lib")
def main() -> None:
    """CLIP-GEN workbench: text-to-image from images without captions."""


def _run_options(command):
    """What every stage takes: the notebooks' PRESET, RUN, DATA, SEED, DEVICE and CLIP."""
    for option in (
        click.option(
            "--clip", default="", help="a folder in open_clip's layout, or MODEL/WEIGHTS  [default: the preset's]"
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
        click.option("--seed", default=0, show_default=True),
        click.option(
            "--data",
            default="shapes",
            show_default=True,
            help="'shapes', a COCO root, a folder of images, or tar or parquet shards",
        ),
        click.option("--run", "run", default="demo", show_default=True, help="name of the folder under results/"),
        click.option("--preset", type=click.Choice(list(PRESETS)), default="laptop", show_default=True),
    ):
        command = option(command)
    return command


def _open(preset: str, run: str, data: str, seed: int, device: str, clip: str):
    from .runtime.distributed import world_size, is_main, barrier
    from .workbench import Workbench

    _join(device)
    wb = Workbench.open(preset, run, data, seed, device, clip)
    if wb.notice:
        _say(wb.notice, err=True)
    if world_size() > 1 and wb.has_oracle:
        if is_main():
            wb.images()  # makes the Shapes world where it has not been made
        barrier()
    return wb


def _join(device: str) -> None:
    """Take this process into its launch, by gloo where it computes on the CPU."""
    from .runtime.distributed import join
    from .workbench import pick_device

    join(pick_device(device))


def _alone(step: str) -> None:
    """Small networks are trained by one process."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ClipgenError(
            f"{step} trains a small network in one process: start it without accelerate launch or torchrun"
        )


def _say(text: object, err: bool = False) -> None:
    """Print, in a launch by the first process alone."""
    from .runtime.distributed import is_main

    if is_main():
        click.echo(text, err=err)


@main.command("train-vqgan")
@_run_options
@click.option("--steps", default=0, help="training steps  [default: the preset's]")
def train_vqgan(steps: int, **run_options) -> None:
    """Stage 1: train the VQGAN on images."""
    wb = _open(**run_options)
    wb.train_vqgan(steps)
    _say(wb.run.summary().get("vqgan"))


@main.command("extract")
@_run_options
def extract(**run_options) -> None:
    """Encode every image once into tokens and an embedding."""
    wb = _open(**run_options)
    store = wb.extract()
    _say(f"{len(store)} rows of {store.meta['L']} tokens in {store.folder}")


@main.command("train-transformer")
@_run_options
@click.option("--steps", default=0, help="training steps  [default: the preset's]")
def train_transformer(steps: int, **run_options) -> None:
    """Stage 2: train the transformer on the token store."""
    wb = _open(**run_options)
    wb.train_transformer(steps)
    _say(wb.run.summary().get("transformer"))


@main.command("evaluate")
@_run_options
@click.option("--guidance", default=0.0, help="guidance scale  [default: the preset's]")
@click.option("--images", type=click.Path(path_type=Path), help="score this folder of images instead of a run")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="a COCO root, a folder, shards, or statistics of pytorch-fid (npz)",
)
@click.option(
    "--captions",
    type=click.Path(path_type=Path),
    help="name<TAB>caption lines, COCO's captions json, or {name: caption}",
)
@click.option("--split", default="val", show_default=True, help="of a COCO root as reference, such as val2014")
@click.option(
    "--protocol",
    "protocols",
    multiple=True,
    help="inception, clean, torchmetrics, dmgan or clip; may be repeated  [default: inception and clip]",
)
@click.option(
    "--size", default=0, help="side in pixels that both sets are brought to  [default: that of the scored images]"
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="json file for the numbers; the caption list goes beside it"
)
def evaluate(
    guidance: float,
    images: Path,
    reference: Path,
    captions: Path,
    split: str,
    protocols: tuple[str, ...],
    size: int,
    output: Path,
    **run_options,
) -> None:
    """Score a run, or with --images any folder of images.

    Of a run: FID-k, rFID, KID, CapS, R-precision and, on shapes, the oracle. Of a folder: the same without rFID and oracle,
    against --reference, with --clip as the evaluation CLIP, under every --protocol whose weights are on this machine.
    """
    if images is None:
        if reference or captions or protocols or size or output:
            raise ClipgenError(
                "--reference, --captions, --protocol, --size and --output are for a folder: name it by --images"
            )
        from .metrics.report import table

        wb = _open(**run_options)
        wb.evaluate(guidance)
        _say(table(wb.run.summary()))
        return
    if reference is None:
        raise ClipgenError("a folder is scored against something: give --reference COCO_ROOT, DIR or stats.npz")
    from .clip_embed import ClipEmbedder
    from .config import EvaluateConfig
    from .evaluate import Evaluators, Provenance, open_folder, open_reference, score_images
    from .metrics.captions import caption_list, texts_of
    from .metrics.report import score_table
    from .runtime.distributed import is_main
    from .runtime.runs import write_json
    from .workbench import clip_fields, pick_device

    _join(run_options["device"])
    if not is_main():  # one process scores
        return
    clip = ClipEmbedder.load(**clip_fields(run_options["clip"] or "shapes"), device=pick_device(run_options["device"]))
    scored = open_folder(images, size)
    real, texts = open_reference(reference, scored.size, split), {}
    if captions:
        texts = texts_of(scored, captions, run_options["seed"])
    listed = caption_list((scored.names[row], text) for row, text in texts.items())
    provenance = Provenance(texts, seed=run_options["seed"], captions=listed)
    configs = [EvaluateConfig(protocol=protocol) for protocol in protocols or ("inception", "clip")]
    scores = {c.protocol: score_images(scored, real, c, Evaluators(clip), provenance) for c in configs}
    if not texts and not any(found["fid"] for found in scores.values()):
        raise ClipgenError(" ".join(sentence for found in scores.values() for sentence in found["missing"]))
    click.echo("\n\n".join(map(score_table, scores.values())))
    if output:
        write_json(output, scores)


@main.command("captions")
@click.option(
    "--data", default="shapes", show_default=True, help="'shapes', a COCO root, or a folder of images with captions"
)
@click.option("--split", default="val", show_default=True, help="such as val2014")
@click.option("-n", default=30_000, show_default=True, help="images; a smaller set gives all of its own")
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("captions.txt"), show_default=True)
def captions(data: str, split: str, n: int, seed: int, output: Path) -> None:
    """Write the caption list of the COCO protocol, one caption an image by seed, for other models to draw and be scored by."""
    from .data.datasets import open_images
    from .metrics.captions import caption_facts, caption_list, choose_captions
    from .runtime.runs import write_atomic

    images = open_images(data, split)
    pairs = choose_captions(images, min(n, sum(map(bool, images.captions))), seed)
    top = f"{images.split}/" if (images.root / images.split).is_dir() else ""
    listed = caption_list((images.names[row].removeprefix(top), text) for row, text in pairs)
    write_atomic(output, listed)
    click.echo(
        f"{len(pairs)} captions of {images.name}/{images.split} in {output}, hash {caption_facts(listed)['hash']}"
    )


@main.command("generate")
@click.argument("prompt")
@click.option("--run", "run", help="a trained run under results/  [default: the weights that come with the project]")
@click.option("-n", default=8, type=click.IntRange(1), show_default=True, help="images")
@click.option("--seed", default=0, show_default=True, help="image j uses seed + j")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("out.png"), show_default=True)
@click.option("--guidance", type=float, help="guidance scale  [default: the preset's]")
@click.option("--temperature", type=float)
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--candidates", type=int, help="draw that many for each image and keep the one that CLIP finds nearest")
@click.option("--device", default="auto", show_default=True)
def generate(prompt, run, n, seed, output, device, **settings) -> None:
    """Draw images for PROMPT."""
    from PIL import Image

    from .data.images import grid
    from .runtime.distributed import is_main
    from .text_to_image import TextToImage, generate_together
    from .workbench import Workbench, pick_device

    if output.suffix.lower() not in Image.registered_extensions() or not output.parent.is_dir():
        raise ClipgenError(
            f"{output} cannot be written as an image: give a name such as out.png in a folder that exists"
        )
    _join(device)
    if run:
        generator = Workbench.reopen(run, device).generator()
    else:
        generator = TextToImage.from_pretrained("shapes").to(pick_device(device))
    chosen = {key: value for key, value in settings.items() if value is not None}
    images = generate_together(generator, [prompt] * n, list(range(seed, seed + n)), show_progress=True, **chosen)
    if is_main():
        Image.fromarray(grid(images, columns=min(n, 8))).save(output)
    _say(f"{n} images of {prompt!r} in {output}")


@main.command("best")
@click.argument("stage", type=click.Choice(["vqgan", "transformer"]))
@click.option("--run", "run", required=True, help="a trained run under results/")
def best(stage: str, run: str) -> None:
    """Take the weights of STAGE's best checkpoint on held-out images instead of its last ones."""
    from .workbench import Workbench, take_best

    found = take_best(Workbench.reopen(run, "cpu").run, stage)
    after = ": extract again, the store was made by the last ones" if stage == "vqgan" else ""
    click.echo(f"{stage} of {run}: weights of step {found['step']}, held-out score {found['score']:.4g}{after}")


@main.command("export")
@click.option("--run", "run", default="reference", show_default=True, help="a trained run under results/")
@click.option(
    "--to", "folder", type=click.Path(path_type=Path), help="a new folder  [default: results/<run>/generator]"
)
@click.option(
    "-n", type=click.IntRange(1), default=1_000, show_default=True, help="prompts of each kind for the oracle"
)
@click.option(
    "--candidates", type=click.IntRange(1), default=16, show_default=True, help="of the oracle's second column"
)
@click.option("--device", default="auto", show_default=True)
def export(run: str, folder: Path | None, n: int, candidates: int, device: str) -> None:
    """Write a run's generator in float16 for TextToImage.from_pretrained, and measure what was written."""
    from .workbench import Workbench

    wb = Workbench.reopen(run, device)
    folder = folder or wb.run.path / "generator"
    click.echo(wb.export(folder, n, candidates))
    click.echo(f"generator in {_short(folder)}: TextToImage.from_pretrained reads it")


@main.command("train-classifier")
@_run_options
def train_classifier(**run_options) -> None:
    """Train the judge of classes on real images in class folders; `evaluate` then uses it."""
    _alone("train-classifier")
    click.echo(_open(**run_options).train_classifier())


@main.command("compare")
@click.argument("table", type=click.Choice(["ablation", "systems", "curves", "photos"]))
@click.option("--run", "run", default="laptop", show_default=True, help="a run whose VQGAN and store all rows share")
@click.option("--steps", default=0, help="of each transformer  [default: the preset's]")
@click.option("--row", "only", multiple=True, help="make only these rows")
@click.option("--data", default="", help="where the run's images lie  [default: as the run says]")
@click.option("--device", default="auto", show_default=True)
def compare(table: str, run: str, steps: int, only: tuple[str, ...], data: str, device: str) -> None:
    """Make a table of the comparison: levers on the plain recipe, the systems, or both recipes on photos.

    Rows that are there are kept.
    """
    from .study.compare import TABLES, lines_of, run_table
    from .workbench import Workbench

    entries = run_table(Workbench.reopen(run, device, data), TABLES[table], steps=steps, only=only)
    click.echo(lines_of(entries, TABLES[table].columns))


@main.command("train-clip")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="laptop", show_default=True)
@click.option("--run", default="shapes-clip", show_default=True)
@click.option("--data", default="shapes", show_default=True, help="'shapes', or images with captions or class folders")
@click.option("--steps", default=0, help="training steps  [default: the preset's]")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="auto", show_default=True)
def train_clip(preset: str, run: str, data: str, steps: int, seed: int, device: str) -> None:
    """Train a small CLIP where none can be downloaded (the only training that sees captions)."""
    _alone("train-clip")
    from .clip_embed import ClipEmbedder
    from .config import load_preset
    from .data.datasets import open_images
    from .study.train_clip import MODEL, ImagePairs, ScenePairs, caption_accuracy
    from .study.train_clip import train_clip as train
    from .workbench import pick_device

    config, opened = (
        load_preset(preset, **({"clip_train": {"steps": steps}} if steps else {})).clip_train,
        open_run(run),
    )
    device, size = pick_device(device), MODEL["vision_cfg"]["image_size"]
    pairs = ScenePairs(config, seed) if data == "shapes" else ImagePairs(open_images(data, "train", size), config, seed)
    folder = train(opened, pairs, config, seed, device)
    if data != "shapes":
        clip = ClipEmbedder.load(str(folder), device=device)
        opened.add_to_summary(
            clip={split: caption_accuracy(clip, open_images(data, split, size)) for split in ("train", "val")}
        )
        click.echo(opened.summary()["clip"])
    click.echo(f"CLIP in {_short(folder)}: name the folder as --clip, or as notebook parameter CLIP")


@main.command("doctor")
def doctor() -> None:
    """Say what this machine has, which weights are here, and which preset fits; nothing is downloaded."""
    from .doctor import diagnose

    page, problem = diagnose()
    click.echo(page)
    if problem:
        raise ClipgenError(problem)


@main.command("cost")
@click.argument("name", type=click.Choice(list(PRESETS)))
@click.option(
    "--images",
    type=click.IntRange(1),
    help="images of the train split  [default: ImageNet-1k's for imagenet, else MS-COCO 2017's]",
)
@click.option(
    "--gpus", type=click.IntRange(1), multiple=True, default=(1, 8, 64), show_default=True, help="may be repeated"
)
@click.option(
    "--peak",
    type=click.FloatRange(0, min_open=True),
    default=989.0,
    show_default=True,
    help="TFLOP/s of one GPU in bfloat16 (H100 and H200, data sheet)",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    help="of the peak that is taken to be reached  [default: what `scale` has measured of the preset on a GPU, else 0.4]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="json file for the numbers")
def cost(name: str, images: int | None, gpus: tuple[int, ...], peak: float, share: float | None, output: Path) -> None:
    """Count what a preset costs on a data set, in GPU hours, memory and disk; nothing is trained."""
    from .config import load_preset
    from .cost import UTILISATION, data_set_of, lines_of, measured_decoding, measured_share, project
    from .runtime.runs import RESULTS, write_json

    peak, images = peak * 1e12, images or data_set_of(name).images
    share = share or measured_share(RESULTS / "scale" / "gpu.json", name, peak) or UTILISATION
    decoded = measured_decoding(RESULTS / "scale", load_preset(name).vqgan.image_size)
    found = [project(load_preset(name), images, peak, count, share, decoded) for count in gpus]
    click.echo(lines_of(found))
    if output:
        write_json(output, found)


@main.command("preset")
@click.argument("name", type=click.Choice(list(PRESETS)))
@click.option("--step/--no-step", default=True, show_default=True, help="take one optimiser step of each stage")
@click.option("--clip-dim", default=512, show_default=True, help="dimensions of the conditioning CLIP")
def preset(name: str, step: bool, clip_dim: int) -> None:
    """Build a preset, take one optimiser step of each stage, and print its parameter counts and memory."""
    from .config import load_preset
    from .workbench import count_and_step

    for key, value in count_and_step(load_preset(name), clip_dim, optimise=step).items():
        click.echo(f"{key:24}{value:,.4g}" if isinstance(value, float) else f"{key:24}{value:,}")


@main.command("run")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="laptop", show_default=True)
@click.option(
    "--run",
    "run",
    default=None,
    help="name of the folder under results/  [default: the preset's, with the folder's name]",
)
@click.option("--notebook", "only", multiple=True, help="run only these: a name or its beginning, such as 04")
@click.option(
    "-p", "parameters", multiple=True, metavar="KEY=VALUE", help="a notebook parameter, such as DATA=/my/photos"
)
def run_notebooks(preset: str, run: str | None, only: tuple[str, ...], parameters: tuple[str, ...]) -> None:
    """Run the notebooks in order by papermill; executed copies go to results/<run>/notebooks/."""
    chosen = _choose(only)
    known = {name: _parameters_of(name) for name in chosen}
    texts = {key for names in known.values() for key, is_text in names.items() if is_text}
    given = dict(_parse(text, texts) for text in parameters)
    values = {"PRESET": preset} | given
    for key in given:
        if not any(key in names for names in known.values()):
            everything = sorted(set().union(*known.values()))
            raise ClipgenError(f"no notebook has a parameter {key!r}: choose from {', '.join(everything)}")
    for key in ("DATA", "CLIP"):  # notebooks run in their own folder
        if values.get(key, "shapes") != "shapes" and Path(values[key]).expanduser().exists():
            values[key] = str(Path(values[key]).expanduser().resolve())
    trains = any("PRESET" in names for names in known.values())
    default = _default_run(values["PRESET"], values.get("DATA", "shapes")) if trains else chosen[0].partition("_")[2]
    values["RUN"] = run or values.get("RUN") or default
    if notice := _check(values):
        click.echo(notice, err=True)
    opened = open_run(values["RUN"])
    for index, name in enumerate(chosen):
        click.echo(f"{name}.ipynb ({index + 1} of {len(chosen)})", err=True)
        _execute(name, {k: v for k, v in values.items() if k in known[name]}, opened.file("notebooks", f"{name}.ipynb"))
    summary = opened.summary()
    if "evaluation" in summary:
        from .metrics.report import table

        click.echo(table(summary))
    if skipped := summary.get("skipped"):
        name, why = next(iter(skipped.items()))
        click.echo(f"{len(skipped)} files were left out, the first {name} ({why})")
    if "prompts" in summary and "04_evaluate" in chosen:
        click.echo(
            f"{len(summary['prompts']['asked'])} prompts drawn ({summary['prompts']['source']}): {_short(opened.path / 'figures' / 'prompts.png')}"
        )
        if notice:
            click.echo(notice)
    click.echo(f"images: {_short(opened.path / 'figures')}   numbers: {_short(opened.path / 'summary.json')}")


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _default_run(preset: str, data: str) -> str:
    """The preset's name, and of other data than the Shapes world also their folder's: the committed runs have the plain names."""
    folder = re.sub(r"[^\w-]+", "-", Path(data).name).strip("-")
    return preset if data == "shapes" else f"{preset}-{folder or 'pictures'}"


def _check(values: dict) -> str:
    """What can be told before hours of training: prompts that are none are an error, a CLIP of shapes for photos a notice."""
    from .clip_embed import photo_notice
    from .config import load_preset
    from .metrics.captions import split_prompts
    from .workbench import clip_fields

    split_prompts(values.get("PROMPTS", ""))
    clip = clip_fields(values["CLIP"])["name"] if values.get("CLIP") else load_preset(values["PRESET"]).clip.name
    return photo_notice(clip, values.get("DATA", "shapes"))


def _parse(text: str, texts: set[str]) -> tuple[str, object]:
    """KEY=VALUE as papermill reads it: numbers and booleans by their looks, everything else and the keys of `texts` a string."""
    from papermill.cli import _resolve_type

    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise ClipgenError(f"parameter {text!r} is not KEY=VALUE: write for example -p SEED=1")
    return key, value if key in texts else _resolve_type(value)


def _choose(only: tuple[str, ...]) -> list[str]:
    available = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    if not only:
        return list(NOTEBOOKS)
    chosen = []
    for wanted in only:
        matches = [
            name for name in available if name == wanted or name.startswith(wanted) or name.endswith(f"_{wanted}")
        ]
        if len(matches) != 1:
            raise ClipgenError(f"{len(matches)} notebooks match {wanted!r}: name one of {', '.join(available)}")
        chosen += matches
    return chosen


def _parameters_of(name: str) -> dict[str, bool]:
    """Names of a notebook's parameters, and of each whether it is a text."""
    import papermill

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = papermill.inspect_notebook(str(ROOT / "notebooks" / f"{name}.ipynb"))
    return {key: parameter["default"].startswith('"') for key, parameter in found.items()}


def _execute(name: str, values: dict, output: Path) -> None:
    """Run one notebook, its bars on this terminal; a ClipgenError inside becomes the command's own error."""
    import nbformat
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    source = ROOT / "notebooks" / f"{name}.ipynb"
    try:
        papermill.execute_notebook(
            str(source),
            str(output),
            values,
            cwd=str(source.parent),
            progress_bar=False,
            stderr_file=sys.stderr,
            kernel_name="python3",
            extra_arguments=["--IPKernelApp.log_level=40"],
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == "ClipgenError":
            raise ClipgenError(f"{name}: {error.evalue}") from None
        raise
    finally:
        if output.exists():
            text = output.read_text(encoding="utf-8")
            for path in (Path(values.get(key, "")) for key in ("DATA", "CLIP")):
                if path.is_absolute():  # a copy to share names the data, not where they lie on this machine
                    text = text.replace(str(path), path.name)
            nbformat.write(tidied(nbformat.reads(text, as_version=4)), output)


def tidied(notebook):
    """A notebook as it is kept: without what only a running kernel can show (widgets, animations), without what bars and
    libraries left on stderr, and without papermill's and nbclient's notes, which name this machine."""
    live = {"application/vnd.jupyter.widget-view+json", "image/gif"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if not (output.output_type == "stream" and output.name == "stderr")
                and not live & set(output.get("data", {}))
            ]
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    return notebook
