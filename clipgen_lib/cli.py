"""The command line: all notebooks by papermill, or one stage at a time without a notebook.

Heavy modules are imported inside the commands, so that `clipgen --help` answers at once.
"""

import ast
import json
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import click
from click.core import ParameterSource

from .config import PRESETS
from .runtime import runs
from .runtime.runs import MOST_SEED, RESULTS, ROOT, ClipgenError, held, open_run, progress, refuse_published, shortened

PATHS = ("PRESET", "DATA", "CLIP", "IMAGE", "WEIGHTS")  # parameters of notebooks that may be paths
NOTEBOOKS = ("01_train_vqgan", "02_extract_tokens", "03_train_transformer", "04_evaluate")
PATH = click.Path(path_type=Path)
PRESET = click.option("--preset", default="laptop", help=f"{', '.join(PRESETS)}, or a YAML file of your own")
SET = click.option("--set", "changes", multiple=True, metavar="PART.FIELD=VALUE", help="such as transformer.width=256")
DATA = click.option("--data", default="shapes", help="'shapes', a COCO root, a folder, or a data set of Hugging Face")
SEED = click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, help="image j uses seed + j")
DEVICE = click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
STEPS = click.option("--steps", type=click.IntRange(0), default=0, help="training steps; 0 takes the preset's")
RUN = click.option("--run", default="demo", help="name of the folder under results/")
CLIP = click.option("--clip", default="", help="a folder in open_clip's layout, or MODEL/WEIGHTS; else the preset's")


def _run_options(command):
    """What every stage takes: the notebooks' PRESET, OVERRIDES, RUN, DATA, SEED, DEVICE and CLIP."""
    for option in (CLIP, DEVICE, SEED, DATA, RUN, SET, PRESET):
        command = option(command)
    return command


class _Commands(click.Group):
    """Our own errors, and those of disk, rights and memory, end a command with a sentence and exit status 1; a bug shows."""

    def invoke(self, context: click.Context):
        from .runtime.distributed import together

        try:
            with together(), runs.room_on_disk():
                return super().invoke(context)
        except ClipgenError as error:
            failed = click.ClickException(str(error))
            failed.exit_code = error.exit_code
            raise failed from None


@click.group(cls=_Commands, context_settings={"show_default": True})
@click.version_option(package_name="clipgen_lib")
def main() -> None:
    """CLIP-GEN workbench: text-to-image from images without captions."""


def _open(run: str, device: str, data: str, changes: tuple[str, ...], begins: bool = True, **others):
    """The run of a stage's options; one that is not there is begun, or refused by a stage that goes on from others."""
    from .config import load_preset
    from .runtime.distributed import barrier, is_main, world_size
    from .workbench import Workbench

    _join(device)
    source = click.get_current_context().get_parameter_source
    given = {name for name in ("data", *others) if source(name) != ParameterSource.DEFAULT}
    folder = open_run(run).path
    if not begins and not folder.is_dir():
        raise ClipgenError(f"there is no run {run!r}: begin it with 'clipgen run' or 'clipgen train-vqgan'")
    if (folder / "config.json").is_file() and given <= {"data"} and not changes:  # the run knows what it was begun with
        wb = Workbench.reopen(run, device, data if given else "")
    else:
        preset = load_preset(others.pop("preset"), shlex.join(changes))
        wb = Workbench.open(preset, run, data, device=device, **others)
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
    """Raises `ClipgenError` in a launch: small networks are trained by one process."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ClipgenError(f"{step} trains in one process: start it without accelerate launch or torchrun")


def _say(text: object, err: bool = False) -> None:
    """Print, in a launch by the first process alone."""
    from .runtime.distributed import is_main

    if is_main():
        click.echo(text, err=err)


@main.command("train-vqgan")
@_run_options
@STEPS
def train_vqgan(steps: int, **run_options) -> None:
    """Stage 1: train the VQGAN on images."""
    wb = _open(**run_options)
    wb.train_vqgan(steps)
    _say(wb.run.summary().get("vqgan"))


@main.command("extract")
@_run_options
def extract(**run_options) -> None:
    """Encode every image once into tokens and an embedding."""
    wb = _open(begins=False, **run_options)
    store = wb.extract()
    _say(f"{len(store)} rows of {store.meta['L']} tokens in {store.folder}")


@main.command("train-transformer")
@_run_options
@STEPS
def train_transformer(steps: int, **run_options) -> None:
    """Stage 2: train the transformer on the token store."""
    wb = _open(begins=False, **run_options)
    wb.train_transformer(steps)
    _say(wb.run.summary().get("transformer"))


@main.command("evaluate")
@_run_options
@click.option("--guidance", default=0.0, help="guidance scale; 0 takes the preset's")
@click.option("--generator", help="evaluate this saved generator (a folder, 'shapes', a hub id) in place of the run's")
@click.option("--images", type=PATH, help="score this folder of images instead of a run")
@click.option("--reference", type=PATH, help="a COCO root, a folder, or statistics of pytorch-fid (npz)")
@click.option("--captions", type=PATH, help="name<TAB>caption lines, COCO's captions json, or {name: caption}")
@click.option("--split", help="of a COCO root or of a folder with splits as reference  [default: val]")
@click.option("--protocol", "protocols", multiple=True, help="inception, clean, torchmetrics, dmgan or clip")
@click.option("--size", type=click.IntRange(0, 4_096), default=0, help="side in pixels; 0 takes the scored images'")
@click.option("-o", "--output", type=PATH, help="json file for the numbers; the caption list goes beside it")
def evaluate(guidance: float, generator: str | None, images: Path | None, **options) -> None:
    """Score a run, or with --images any folder of images.

    Of a run: FID-k, rFID, KID, CapS, R-precision and, on shapes, the oracle. Of a folder: the same without rFID and oracle,
    against --reference, with --clip as the evaluation CLIP, under every --protocol whose weights are on this machine.
    """
    of_folder = {name: options.pop(name) for name in ("reference", "captions", "split", "protocols", "size", "output")}
    if images is not None:
        _evaluate_folder(images, options, **of_folder)
        return
    if any(of_folder.values()):
        raise ClipgenError(
            "--reference, --captions, --split, --protocol, --size, --output need a folder: name it by --images"
        )
    from .metrics.report import table
    from .runtime.distributed import barrier
    from .text_to_image import TextToImage

    wb = _open(begins=False, **options)
    wb.evaluate(guidance, generator and TextToImage.from_pretrained(generator).to(wb.device))
    barrier()  # the first process has written the numbers
    _say(table(wb.run.summary()))


def _evaluate_folder(images: Path, run_options: dict, reference: Path | None, output: Path | None, **options) -> None:
    """Score a folder of anybody's images against a reference."""
    from .clip_embed import ClipEmbedder
    from .config import EvaluateConfig
    from .evaluate import Evaluators, Provenance, open_folder, open_reference, score_images
    from .metrics.captions import caption_list, texts_of
    from .metrics.report import score_table
    from .runtime.distributed import is_main
    from .runtime.runs import write_json
    from .workbench import clip_fields, pick_device

    if reference is None:
        raise ClipgenError("a folder is scored against something: give --reference COCO_ROOT, DIR or stats.npz")
    if output and (output.suffix != ".json" or not output.parent.is_dir()):
        raise ClipgenError(f"{output} cannot be written: give a name such as scores.json in a folder that exists")
    _join(run_options["device"])
    if not is_main():  # one process scores
        return
    clip = ClipEmbedder.load(**clip_fields(run_options["clip"] or "shapes"), device=pick_device(run_options["device"]))
    scored = open_folder(images, options["size"])
    real, texts = open_reference(reference, scored.size, options["split"] or ""), {}
    if options["captions"]:
        texts = texts_of(scored, options["captions"], run_options["seed"])
    listed = caption_list((scored.names[row], text) for row, text in texts.items())
    provenance = Provenance(texts, seed=run_options["seed"], captions=listed)
    default = ("inception",) if reference.suffix == ".npz" else ("inception", "clip")  # pytorch-fid's are of Inception
    configs = [EvaluateConfig(protocol=protocol) for protocol in options["protocols"] or default]
    scores = {c.protocol: score_images(scored, real, c, Evaluators(clip), provenance) for c in configs}
    if not texts and not any(found["fid"] for found in scores.values()):
        raise ClipgenError(" ".join(sentence for found in scores.values() for sentence in found["missing"]))
    click.echo("\n\n".join(map(score_table, scores.values())))
    if output:
        write_json(output, scores)


@main.command("generate")
@click.argument("prompt")
@click.option("--run", help="a trained run under results/  [default: the weights that come with the project]")
@click.option("-n", default=8, type=click.IntRange(1, 10_000), help="images")
@SEED
@click.option("-o", "--output", type=PATH, default=Path("out.png"))
@click.option("--guidance", type=float, help="guidance scale  [default: the preset's]")
@click.option("--temperature", type=float)
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--candidates", type=int, help="sample so many for each image and keep the one that CLIP finds nearest")
@DEVICE
def generate(prompt: str, run: str | None, n: int, seed: int, output: Path, device: str, **settings) -> None:
    """Generate images for PROMPT."""
    from PIL import Image

    from .data.images import grid
    from .runtime.distributed import is_main
    from .text_to_image import TextToImage
    from .workbench import Workbench, pick_device

    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE or not output.parent.is_dir():
        raise ClipgenError(f"{output} cannot be written: give an image name such as out.png in a folder that exists")
    for folder in output.absolute().parents:
        refuse_published(folder)
    if not prompt.strip():
        raise ClipgenError("the prompt is empty: say what to generate, for example 'a large red circle'")
    _join(device)
    if run:
        generator = Workbench.reopen(run, device).generator()
    else:
        generator = TextToImage.from_pretrained("shapes").to(pick_device(device))
    chosen = {key: value for key, value in settings.items() if value is not None}
    with progress(100, "generating", is_main()) as bar:
        for preview in generator.generate_progressively(prompt, n, seed, **chosen):
            bar.update(round(100 * preview.share) - bar.n)
    if is_main():
        Image.fromarray(grid(preview.images, columns=min(n, 8))).save(output)
    _say(f"{n} images of {prompt!r} in {output}")


@main.command("export")
@click.option("--run", default="demo", help="a trained run under results/")
@click.option("--to", "folder", type=PATH, help="a new folder  [default: results/<run>/generator]")
@click.option("-n", type=click.IntRange(1), default=1_000, help="oracle prompts of each kind")
@click.option("--candidates", type=click.IntRange(1), default=16, help="in the oracle's second column")
@DEVICE
def export(run: str, folder: Path | None, n: int, candidates: int, device: str) -> None:
    """Write a run's generator in float16 for TextToImage.from_pretrained, and measure what was written."""
    from .workbench import Workbench

    wb = Workbench.reopen(run, device)
    folder = (folder or wb.run.path / "generator").absolute()
    click.echo(wb.export(folder, n, candidates))
    click.echo(f"generator in {folder}: TextToImage.from_pretrained reads it")


@main.command("train-classifier")
@_run_options
def train_classifier(**run_options) -> None:
    """Train the classifier of real images in class folders; `evaluate` then uses it."""
    _alone("train-classifier")
    click.echo(_open(**run_options).train_classifier())


@main.command("compare")
@click.argument("table", type=click.Choice(["ablation", "systems", "curves", "photos"]))
@click.option("--run", default="demo", help="a run whose VQGAN and store all rows share")
@STEPS
@click.option("--row", "only", multiple=True, help="make only these rows")
@click.option("--data", default="", help="where the run's images lie  [default: as the run says]")
@DEVICE
def compare(table: str, run: str, steps: int, only: tuple[str, ...], data: str, device: str) -> None:
    """Make a table of the comparison: ablations, systems, or both recipes on photos. Rows that are there are kept."""
    from .study.compare import TABLES, run_table, table_text
    from .workbench import Workbench

    wb = Workbench.reopen(run, device, data)
    with held(RESULTS / table, f"table {table!r}"):
        entries = run_table(wb, TABLES[table], steps=steps, only=only)
    click.echo(table_text(entries, TABLES[table].columns))


@main.command("train-clip")
@PRESET
@click.option("--run", default="my-clip", help="name of the folder under results/")
@DATA
@STEPS
@SEED
@DEVICE
@SET
def train_clip(run: str, data: str, seed: int, device: str, **of_preset) -> None:
    """Train a small CLIP where none can be downloaded (the only training that sees captions)."""
    _alone("train-clip")
    from .clip_embed import ClipEmbedder
    from .config import load_preset
    from .data.datasets import open_images
    from .study import train_clip as study
    from .workbench import pick_device

    of_steps = {"clip_train": {"steps": of_preset["steps"]}} if of_preset["steps"] else {}
    config = load_preset(of_preset["preset"], shlex.join(of_preset["changes"]), **of_steps).clip_train
    device, size = pick_device(device), study.MODEL["vision_cfg"]["image_size"]
    opened = replace(open_run(run), seed=seed, device=device)
    runs.refuse_published(opened.path)
    if data == "shapes":
        pairs = study.ScenePairs(config, seed)
    else:
        pairs = study.ImagePairs(open_images(data, "train", size), config, seed)
    with held(opened.path, f"run {run!r}"):
        folder = study.train_clip(opened, pairs, config)
    if data != "shapes":
        clip = ClipEmbedder.load(str(folder), device=device)
        accuracy = {s: study.caption_accuracy(clip, open_images(data, s, size)) for s in ("train", "val")}
        opened.add_to_summary(clip=accuracy)
        click.echo(accuracy)
    click.echo(f"CLIP in {folder}: name the folder as --clip, or as notebook parameter CLIP")


@main.command("config")
@click.argument("preset", default="laptop")
@SET
def show_config(preset: str, changes: tuple[str, ...]) -> None:
    """Print PRESET with its changes as YAML; a file with some of these lines, and `base: PRESET`, is a preset of its own."""
    import yaml

    from .config import load_preset

    parts = json.loads(json.dumps(asdict(load_preset(preset, shlex.join(changes)))))  # lists for tuples
    click.echo(yaml.safe_dump({"base": parts.pop("name"), **parts}, sort_keys=False), nl=False)


@main.command("doctor")
def doctor() -> None:
    """Say what this machine has, which weights are here, and which preset fits; nothing is downloaded."""
    from .doctor import report

    page, problem = report()
    click.echo(page)
    if problem:
        raise ClipgenError(problem)


@main.command("run")
@PRESET
@click.option("--run", help="name of the folder under results/  [default: my-PRESET, with the data's name]")
@click.option("--notebook", "only", multiple=True, help="run only these: a name or its beginning, such as 04")
@click.option("-p", "parameters", multiple=True, metavar="KEY=VALUE", help="a parameter, such as DATA=/my/photos")
@SET
def run_notebooks(preset: str, run: str | None, only: tuple, parameters: tuple, changes: tuple[str, ...]) -> None:
    """Run the notebooks in order by papermill; executed copies go to results/<run>/notebooks/."""
    chosen = [_notebook(wanted) for wanted in only or NOTEBOOKS]
    known = {name: parameters_of(name) for name in chosen}
    everything = {key: default for names in known.values() for key, default in names.items()}
    values = {"PRESET": preset} | dict(parse_parameter(text, everything) for text in parameters)
    if changes:
        values["OVERRIDES"] = f"{values.get('OVERRIDES', '')} {shlex.join(changes)}".strip()
    of_preset = default_run(values["PRESET"], values.get("DATA", "shapes"))
    default = of_preset if "PRESET" in everything else chosen[0].partition("_")[2]
    if run and values.get("RUN", run) != run:
        raise ClipgenError(f"the run is called {run!r} by --run and {values['RUN']!r} by -p RUN: give one of them")
    values["RUN"] = run or values.get("RUN") or default
    opened, notice = _checked(values, "DATA" in everything)
    click.echo(notice, err=True, nl=bool(notice))
    copies = opened.file("notebooks", chosen[0]).parent
    with held(copies, f"run {opened.name!r}"):
        for index, name in enumerate(chosen):
            click.echo(f"{name}.ipynb ({index + 1} of {len(chosen)})", err=True)
            _execute(name, {k: v for k, v in values.items() if k in known[name]}, copies / f"{name}.ipynb")
    _tell(opened, "04_evaluate" in chosen, notice)


def _checked(values: dict[str, object], opens_workbench: bool) -> tuple[runs.Run, str]:
    """The run that notebooks are to write, and its notice, after all that can be told before hours of training.

    Paths among the values are made absolute: notebooks run in their own folder.
    """
    from .config import load_preset
    from .metrics.captions import split_prompts
    from .workbench import Workbench, clip_fields, pick_device

    for key in PATHS:
        is_name = values.get(key, "shapes") in ("shapes", *PRESETS)
        if not is_name and os.path.exists(os.path.expanduser(values[key])):
            values[key] = str(Path(values[key]).expanduser().resolve())
    if values.get("CLIP"):
        values["CLIP"] = "/".join(filter(None, clip_fields(values["CLIP"]).values()))
    if values.get("PROCESSES") == 0:
        raise ClipgenError("PROCESSES is 0: give 1 or more")
    split_prompts(values.get("PROMPTS", ""))
    if not opens_workbench:
        device = pick_device(values.get("DEVICE", "auto"))
        return replace(open_run(values["RUN"]), seed=values.get("SEED", 0), device=device), ""
    given = ("RUN", "DATA", "SEED", "DEVICE", "CLIP")
    preset = load_preset(values["PRESET"], values.get("OVERRIDES", ""))
    wb, _ = Workbench.checked(preset, **{key.lower(): values[key] for key in given if key in values})
    return wb.run, wb.notice


def default_run(preset: str, data: str) -> str:
    """my-PRESET, with other data than the Shapes world also their folder's name; no published run is called so."""
    folder = re.sub(r"[^\w-]+", "-", Path(data).name).strip("-")[:60]
    preset = Path(preset).stem
    return f"my-{preset}" if data == "shapes" else f"my-{preset}-{folder or 'images'}"


def parse_parameter(text: str, known: dict[str, object]) -> tuple[str, object]:
    """KEY=VALUE for papermill: of the kind of its default in `known`, a text, a number, or a whole number from 0.

    Raises:
        ClipgenError: not KEY=VALUE, an unknown key, or no such number where one is needed.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise ClipgenError(f"parameter {text!r} is not KEY=VALUE: write for example -p SEED=1")
    if key not in known:
        raise ClipgenError(f"no notebook has a parameter {key!r}: choose from {', '.join(sorted(known))}")
    kind, parsed = type(known[key]), None
    if kind is str:
        return key, value
    with suppress(ValueError, TypeError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        parsed = ast.literal_eval(value.strip())
        parsed = float(parsed) if kind is float and type(parsed) in (int, float) else parsed
    if type(parsed) is not kind or not 0 <= parsed <= MOST_SEED:
        wanted = "a number from 0" if kind is float else "a whole number from 0 to 2^63 - 1"
        raise ClipgenError(f"parameter {key} is {shortened(repr(value), 80)}: give {wanted}")
    return key, parsed


def parameters_of(name: str) -> dict[str, object]:
    """Names of a notebook's parameters and their defaults: texts, whole numbers and floats."""
    import papermill

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = papermill.inspect_notebook(str(ROOT / "notebooks" / f"{name}.ipynb"))
    return {key: ast.literal_eval(parameter["default"]) for key, parameter in found.items()}


def _notebook(wanted: str) -> str:
    available = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    if not available:
        raise ClipgenError(f"{ROOT} has no notebooks: install a clone of the project by 'pip install --editable .'")
    matches = [name for name in available if name.startswith(wanted) or name.endswith(f"_{wanted}")]
    if len(matches) != 1:
        raise ClipgenError(f"{len(matches)} notebooks match {wanted!r}: name one of {', '.join(available)}")
    return matches[0]


def _execute(name: str, values: dict, output: Path) -> None:
    """Run one notebook, its bars on this terminal; an error inside that a user can mend becomes the command's own."""
    import nbformat
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    source = ROOT / "notebooks" / f"{name}.ipynb"
    options = {"progress_bar": False, "stderr_file": runs.Unbroken(sys.stderr), "kernel_name": "python3"}
    options["extra_arguments"] = ["--IPKernelApp.log_level=40"]
    here = str(Path(__file__).parents[1])  # the kernel imports the library that this command is of
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    stopped = ""
    try:
        with runs.stoppable(_interrupt_kernel) as stop:
            papermill.execute_notebook(str(source), str(output), values, cwd=str(source.parent), **options)
    except (papermill.PapermillExecutionError, RuntimeError) as error:  # a kernel that dies is a RuntimeError
        kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
        ours = kind in {"ClipgenError", *(kind.__name__ for kind in ClipgenError.__subclasses__())}
        stopped = text if ours else runs.explained("MemoryError" if "ernel died" in text else kind, text)
        if not stopped and not stop.number:
            raise
    finally:
        if output.exists():
            text = output.read_text(encoding="utf-8")
            for path in filter(Path.is_absolute, (Path(values.get(key, "")) for key in PATHS)):
                text = text.replace(str(path), path.name)  # a copy names the data, not where they lie on this machine
            nbformat.write(tidied(nbformat.reads(text, as_version=4)), output)
    if stop.number:
        raise runs.Stopped(stop.number, f"in {name}")
    if stopped:
        raise ClipgenError(f"{name}: {stopped}")


def _interrupt_kernel() -> None:
    """A kernel has a session of its own, where no Ctrl-C, closed terminal or SIGTERM of this command comes; it saves first."""
    import psutil

    for kernel in psutil.Process().children():
        kernel.send_signal(signal.SIGINT)


def _tell(run, is_evaluated: bool, notice: str) -> None:
    """What the notebooks found, in a few lines."""
    summary = run.summary()
    if "evaluation" in summary:
        from .metrics.report import table

        click.echo(table(summary))
    if skipped := summary.get("skipped"):
        name, why = next(iter(skipped.items()))
        click.echo(f"{len(skipped)} files were left out, the first {name} ({why})")
    if is_evaluated and (prompts := summary.get("prompts")):
        figure = run.path / "figures" / "prompts.png"
        click.echo(f"images for {len(prompts['asked'])} prompts ({prompts['source']}): {figure}")
        click.echo(notice, nl=bool(notice))
    click.echo(f"images: {run.path / 'figures'}   numbers: {run.path / 'summary.json'}")


def tidied(notebook):
    """A notebook without what only a running kernel shows (widgets, animations), without stderr and notes that name this machine."""
    live = {"application/vnd.jupyter.widget-view+json", "image/gif"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = [output for output in shown if not live & set(output.get("data", {}))]
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    return notebook
