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
from dataclasses import asdict, replace
from pathlib import Path

import click
import psutil
import yaml
from click.core import ParameterSource

import clipgen_lib  # its public names are imported when they are first used

from .config import PRESETS, load_preset
from .metrics.report import score_table, table
from .runtime import runs
from .runtime.runs import MOST_SEED, ROOT, ClipgenError, held, open_run, progress, refuse_published, shortened


def _joined(context: click.Context, option: click.Parameter, device: str) -> str:
    """Take this process into its launch, by gloo where it computes on the CPU; refuse commands for one process."""
    if context.resilient_parsing:  # completion in a shell
        return device
    from .runtime.distributed import join
    from .workbench import pick_device

    if context.command.name in ALONE and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ClipgenError(f"{context.command.name} needs one process: start it without accelerate launch or torchrun")
    device = pick_device(device)
    join(device)
    return device


ALONE = ("train-classifier", "train-clip", "compare", "export", "sweep")  # commands for one process, in no launch
PATHS = ("PRESET", "DATA", "CLIP", "IMAGE", "WEIGHTS")  # parameters of notebooks that may be paths
NOTEBOOKS = ("01_train_vqgan", "02_extract_tokens", "03_train_transformer", "04_evaluate")
OF_FOLDER = ("reference", "captions", "protocol", "size", "output")  # options of evaluate, with --images
PATH = click.Path(path_type=Path)
PRESET = click.option("--preset", default="laptop", help=f"{', '.join(PRESETS)}, or a YAML file of your own")
SET = click.option("--set", "changes", multiple=True, metavar="PART.FIELD=VALUE", help="such as transformer.width=256")
DATA = click.option("--data", default="shapes", help="'shapes', a COCO root, a folder, or a data set of Hugging Face")
SEED = click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, help="image j uses seed + j")
DEVICE = click.option("--device", default="auto", callback=_joined, help="auto, cpu, cuda, cuda:1, ...")
STEPS = click.option("--steps", type=click.IntRange(0), default=0, help="training steps; 0 takes the preset's")
RUN = click.option("--run", default="demo", help="name of the folder under results/")
track = lambda context, option, name: name and os.environ.update(CLIPGEN_TRACKER=name)  # kernels inherit it
TRACK = click.option("--tracker", callback=track, expose_value=False, help="tensorboard, wandb, mlflow, ...")
CLIP = click.option("--clip", default="", help="a folder in open_clip's layout, or MODEL/WEIGHTS; else the preset's")
VQGAN = click.option("--vqgan", default="", help="train none: take that of a run, a folder, 'shapes' or RELEASE=FILE")
STORE = click.option("--store", default="", help="extract none: take the VQGAN and the token store of a run")


def _run_options(command):
    """What every stage takes: the notebooks' PRESET, OVERRIDES, RUN, DATA, SEED, DEVICE and CLIP, and short forms of --set."""
    for option in (STORE, VQGAN, CLIP, DEVICE, SEED, DATA, RUN, SET, PRESET):
        command = option(command)
    return command


def _changes(changes: tuple[str, ...], **shared: str) -> str:
    """What --set and its short forms change of a preset."""
    return shlex.join([*changes, *(f"shared.{stage}={source}" for stage, source in shared.items() if source)])


class _Commands(click.Group):
    """What a command returns is printed, in a launch by the first process alone.

    Our own errors, and those of disk, rights and memory, end a command with a sentence and exit status 1; a bug shows.
    """

    def invoke(self, context: click.Context) -> None:
        from .runtime.distributed import is_main, together

        try:
            with together(), runs.room_on_disk():
                said = super().invoke(context)
                if said is not None and is_main():
                    click.echo(said)
        except ClipgenError as error:
            failed = click.ClickException(str(error))
            failed.exit_code = error.exit_code
            raise failed from None


@click.group(cls=_Commands, context_settings={"show_default": True})
@click.version_option(package_name="clipgen_lib")
def main() -> None:
    """CLIP-GEN workbench: text-to-image from images without captions."""


def _open(run: str, device: str, data: str, changes: tuple[str, ...], begins: bool = True, **others):
    """The run of a stage's options; one that is not there is begun, or refused by a stage that goes on from what it lacks."""
    from .runtime.distributed import tell

    source = click.get_current_context().get_parameter_source
    given = {name for name in ("data", *others) if source(name) != ParameterSource.DEFAULT}
    folder = open_run(run).path
    knows = (folder / "config.json").is_file() and given <= {"data"} and not changes  # what it was begun with
    changes = _changes(changes, **{stage: others.pop(stage) for stage in ("vqgan", "store")})
    preset = load_preset(others.pop("preset"), changes)
    if knows or not (begins or folder.is_dir() or any(asdict(preset.shared).values())):
        wb = clipgen_lib.Workbench.reopen(run, device, data if given else "")
    else:
        wb = clipgen_lib.Workbench.open(preset, run, data, device=device, **others)
    tell(wb.notice)
    return wb


@main.command("train-vqgan")
@_run_options
@STEPS
@TRACK
def train_vqgan(steps: int, **run_options) -> dict[str, float]:
    """Stage 1: train the VQGAN on images."""
    return _open(**run_options).train_vqgan(steps)


@main.command("extract")
@_run_options
def extract(**run_options) -> str:
    """Encode every image once into tokens and an embedding."""
    wb = _open(begins=False, **run_options)
    store = wb.extract()
    return f"{len(store)} rows of {store.meta['L']} tokens in {store.folder}"


@main.command("train-transformer")
@_run_options
@STEPS
@TRACK
def train_transformer(steps: int, **run_options) -> dict[str, float]:
    """Stage 2: train the transformer on the token store."""
    return _open(begins=False, **run_options).train_transformer(steps)


@main.command("evaluate")
@_run_options
@click.option("--guidance", default=0.0, help="guidance scale; 0 takes the preset's")
@click.option("--generator", help="evaluate this saved generator (a folder, 'shapes', a hub id) in place of the run's")
@click.option("--images", type=PATH, help="score this folder of images instead of a run")
@click.option("--reference", type=PATH, help="a COCO root, a folder, or statistics (npz) of the one --protocol named")
@click.option("--captions", type=PATH, help="name<TAB>caption lines, COCO's captions json, or {name: caption}")
@click.option("--split", default="", help="of the reference, or of the run's data  [default: val, or the preset's]")
@click.option("--protocol", multiple=True, help="inception, clean, torchmetrics, tf1, dmgan or clip")
@click.option("--size", type=click.IntRange(0, 4_096), default=0, help="side in pixels; 0 takes the scored images'")
@click.option("-o", "--output", type=PATH, help="json file for the numbers; the caption list goes beside it")
def evaluate(guidance: float, generator: str | None, images: Path | None, split: str, **options) -> str | None:
    """Score a run, or with --images any folder of images.

    Of a run: FID-k, rFID, KID, CapS, R-precision and, on shapes, the oracle. Of a folder: the same without rFID and oracle,
    against --reference, with --clip as the evaluation CLIP, under every --protocol whose weights are on this machine.
    """
    if images is not None:
        return _evaluate_folder(images, split=split, **options)
    of_folder = [options.pop(name) for name in OF_FOLDER]
    if any(of_folder):
        raise ClipgenError(f"--{', --'.join(OF_FOLDER)} need a folder: name it by --images")
    wb = _open(begins=False, **options)
    wb.evaluate(guidance, generator and clipgen_lib.TextToImage.from_pretrained(generator).to(wb.device), split)
    return table(wb.run.summary())


def _evaluate_folder(images: Path, reference: Path | None, output: Path | None, clip: str, **options) -> str | None:
    """Score a folder of anybody's images against a reference."""
    from .evaluate import Evaluators, Provenance, open_folder, open_reference, score_images
    from .metrics.captions import caption_list, texts_of
    from .runtime.distributed import is_main
    from .workbench import clip_fields

    if reference is None:
        raise ClipgenError("a folder is scored against something: give --reference COCO_ROOT, DIR or stats.npz")
    protocols = options["protocol"] or ("inception", "clip")
    if reference.suffix == ".npz" and len(options["protocol"]) != 1:
        whose = "inception of pytorch-fid's, clean of clean-fid's, tf1 of TTUR's"
        raise ClipgenError(f"{reference} holds statistics of one protocol: name it by --protocol ({whose})")
    if output and (output.suffix != ".json" or not output.parent.is_dir()):
        raise ClipgenError(f"{output} cannot be written: give a name such as scores.json in a folder that exists")
    if not is_main():  # one process scores
        return None
    embedder = clipgen_lib.ClipEmbedder.load(**clip_fields(clip or "shapes"), device=options["device"])
    scored = open_folder(images, options["size"])
    real = open_reference(reference, scored.size, options["split"], protocols[0])
    texts = texts_of(scored, options["captions"], options["seed"]) if options["captions"] else {}
    listed = caption_list((scored.names[row], text) for row, text in texts.items())
    provenance = Provenance(texts, seed=options["seed"], captions=listed)
    config = load_preset(options["preset"], _changes(options["changes"])).evaluate
    configs = {protocol: replace(config, protocol=protocol) for protocol in protocols}
    scores = {name: score_images(scored, real, c, Evaluators(embedder), provenance) for name, c in configs.items()}
    if not texts and not any(found["fid"] for found in scores.values()):
        raise ClipgenError(" ".join(sentence for found in scores.values() for sentence in found["missing"]))
    if output:
        runs.write_json(output, scores)
        if listed:
            runs.write_atomic(output.with_suffix(".captions.txt"), listed)
    return "\n\n".join(map(score_table, scores.values()))


@main.command("generate")
@click.argument("prompt")
@click.option("--run", help="a trained run under results/, in place of --generator")
@click.option("--generator", help="'shapes', 'fashion', a saved folder, or a hub id  [default: shapes]")
@click.option("-n", default=8, type=click.IntRange(1, 10_000), help="images")
@SEED
@click.option("-o", "--output", type=PATH, default=Path("out.png"))
@click.option("--guidance", type=float, help="guidance scale  [default: the preset's]")
@click.option("--temperature", type=float)
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--align", help="move the text to images: none, shift or standardise, by the generator's statistics")
@click.option("--candidates", type=int, help="sample so many for each image and keep the one that CLIP finds nearest")
@DEVICE
def generate(prompt: str, run: str | None, n: int, seed: int, output: Path, device: str, **options) -> str:
    """Generate images for PROMPT."""
    from PIL import Image

    from .data.images import grid
    from .runtime.distributed import is_main

    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE or not output.parent.is_dir():
        raise ClipgenError(f"{output} cannot be written: give an image name such as out.png in a folder that exists")
    for folder in output.absolute().parents:
        refuse_published(folder)
    if not prompt.strip():
        raise ClipgenError("the prompt is empty: say what to generate, for example 'a large red circle'")
    name = options.pop("generator")
    if run and name:
        raise ClipgenError(f"images come from run {run!r} or from generator {name!r}: give one of them")
    if run:
        wb = clipgen_lib.Workbench.reopen(run, device)
        if not (wb.run.path / "transformer").is_dir():
            raise ClipgenError(f"run {run!r} has no trained transformer here: train it, or name a --generator instead")
        generator = wb.generator()
    else:
        generator = clipgen_lib.TextToImage.from_pretrained(name or "shapes").to(device)
    chosen = {key: value for key, value in options.items() if value is not None}
    with progress(100, "generating", is_main()) as bar:
        for preview in generator.generate_progressively(prompt, n, seed, **chosen):
            bar.update(round(100 * preview.share) - bar.n)
    if is_main():
        Image.fromarray(grid(preview.images, columns=min(n, 8))).save(output)
    return f"{n} images of {prompt!r} in {output}"


@main.command("export")
@click.option("--run", default="demo", help="a trained run under results/")
@click.option("--to", "folder", type=PATH, help="a new folder  [default: results/<run>/generator]")
@click.option("-n", type=click.IntRange(1), default=1_000, help="oracle prompts of each kind")
@click.option("--candidates", type=click.IntRange(1), default=16, help="in the oracle's second column")
@click.option("--data", default="", help="where the run's images lie, to keep what --align needs of their captions")
@DEVICE
def export(run: str, folder: Path | None, n: int, candidates: int, data: str, device: str) -> str:
    """Write a run's generator in float16 for TextToImage.from_pretrained, and measure what was written."""
    wb = clipgen_lib.Workbench.reopen(run, device, data)
    folder = (folder or wb.run.path / "generator").absolute()
    return f"{wb.export(folder, n, candidates, wb.has_oracle or bool(data))}\ngenerator in {folder}: TextToImage.from_pretrained reads it"


@main.command("train-classifier")
@_run_options
def train_classifier(**run_options) -> dict[str, float]:
    """Train the classifier of real images in class folders; `evaluate` then uses it."""
    return _open(**run_options).train_classifier()


@main.command("compare")
@click.argument("name", type=click.Choice(["ablation", "systems", "curves", "photos"]))
@click.option("--run", default="demo", help="a run whose VQGAN and store all rows share")
@STEPS
@click.option("--row", "only", multiple=True, help="make only these rows")
@click.option("--data", default="", help="where the run's images lie  [default: as the run says]")
@DEVICE
def compare(name: str, run: str, steps: int, only: tuple[str, ...], data: str, device: str) -> str:
    """Make a table of the comparison: ablations, systems, or both recipes on photos. Rows that are there are kept."""
    from .study.compare import TABLES, run_table, table_text

    wb = clipgen_lib.Workbench.reopen(run, device, data)
    return table_text(run_table(wb, TABLES[name], steps, only), TABLES[name].columns)


@main.command("train-clip")
@PRESET
@click.option("--run", default="my-clip", help="name of the folder under results/")
@DATA
@STEPS
@SEED
@DEVICE
@SET
def train_clip(run: str, data: str, seed: int, device: str, steps: int, **of_preset) -> str:
    """Train a small CLIP where none can be downloaded (the only training that sees captions)."""
    from .study import train_clip as study

    config = load_preset(of_preset["preset"], shlex.join(of_preset["changes"])).clip_train
    config = replace(config, steps=steps or config.steps)
    opened = replace(open_run(run), seed=seed, device=device)
    refuse_published(opened.path)
    images_of = lambda split: clipgen_lib.open_images(data, split)
    pairs = study.ScenePairs(config, seed) if data == "shapes" else study.ImagePairs(images_of("train"), config, seed)
    with held(opened.path, f"run {run!r}"):
        folder = study.train_clip(opened, pairs, config)
    clip = clipgen_lib.ClipEmbedder.load(str(folder), device=device)
    if data == "shapes":
        found = {"retrieval": {kind: study.retrieval(clip, n_objects=n) for kind, n in study.KINDS.items()}}
    else:
        found = {"clip": {split: study.caption_accuracy(clip, images_of(split)) for split in ("train", "val")}}
    opened.add_to_summary(**found)
    click.echo(found)
    return f"CLIP in {folder}: name the folder as --clip, or as notebook parameter CLIP"


@main.command("config")
@click.argument("preset", default="laptop")
@SET
def show_config(preset: str, changes: tuple[str, ...]) -> str:
    """Print PRESET with its changes as YAML; a file with some of these lines, and `base: PRESET`, is a preset of its own."""
    parts = json.loads(json.dumps(asdict(load_preset(preset, shlex.join(changes)))))  # lists for tuples
    base = {"base": name} if (name := parts.pop("name")) in PRESETS else {}
    return yaml.safe_dump(base | parts, sort_keys=False).rstrip()


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
@TRACK
@SET
@VQGAN
@STORE
def run_notebooks(preset: str, run: str | None, only: tuple, parameters: tuple, **changes) -> str:
    """Run the notebooks in order by papermill; executed copies go to results/<run>/notebooks/."""
    from .metrics.captions import split_prompts
    from .study.released import placed
    from .workbench import clip_fields, pick_device

    chosen = [_notebook(wanted) for wanted in only or NOTEBOOKS]
    known = {name: parameters_of(name) for name in chosen}
    everything = {key: default for names in known.values() for key, default in names.items()}
    values = {"PRESET": preset} | dict(parse_parameter(text, everything) for text in parameters)
    values["OVERRIDES"] = f"{values.get('OVERRIDES', '')} {_changes(**changes)}".strip()
    of_preset = default_run(values["PRESET"], values.get("DATA", "shapes"))
    default = of_preset if "PRESET" in everything else chosen[0].partition("_")[2]
    if run and values.get("RUN", run) != run:
        raise ClipgenError(f"the run is called {run!r} by --run and {values['RUN']!r} by -p RUN: give one of them")
    values["RUN"] = run or values.get("RUN") or default
    for key in PATHS:  # notebooks run in their own folder
        if values.get(key, "shapes") not in ("shapes", *PRESETS):
            values[key] = placed(values[key])[1]
    # all that can be told before hours of training
    if values.get("CLIP"):
        values["CLIP"] = "/".join(filter(None, clip_fields(values["CLIP"]).values()))
    if values.get("PROCESSES") == 0:
        raise ClipgenError("PROCESSES is 0: give 1 or more")
    split_prompts(values.get("PROMPTS", ""))
    pick_device(values.get("DEVICE", "auto"))
    opened, notice = open_run(values["RUN"]), ""
    if "DATA" in everything:
        given = {key.lower(): values[key] for key in ("RUN", "DATA", "SEED", "DEVICE", "CLIP") if key in values}
        wb, _ = clipgen_lib.Workbench.checked(load_preset(values["PRESET"], values["OVERRIDES"]), **given)
        notice, shared = wb.notice, asdict(wb.preset.shared)  # its paths are absolute
        values["OVERRIDES"] = f"{values['OVERRIDES']} {_changes((), **shared)}".strip()
    click.echo(notice, err=True, nl=bool(notice))
    copies = opened.file("notebooks", chosen[0]).parent
    with held(copies, f"run {opened.name!r}"):
        for index, name in enumerate(chosen):
            click.echo(f"{name}.ipynb ({index + 1} of {len(chosen)})", err=True)
            _execute(name, {k: v for k, v in values.items() if k in known[name]}, copies / f"{name}.ipynb")
    summary, figures = opened.summary(), opened.path / "figures"
    found = [table(summary)] if "evaluation" in summary else []
    if skipped := summary.get("skipped"):
        name, why = next(iter(skipped.items()))
        found.append(f"{len(skipped)} files were left out, the first {name} ({why})")
    if "04_evaluate" in chosen and (prompts := summary.get("prompts")):
        about = f"{len(prompts['asked'])} prompts ({prompts['source']})"
        found += [f"images for {about}: {figures / 'prompts.png'}", notice]
    return "\n".join(filter(None, [*found, f"images: {figures}   numbers: {opened.path / 'summary.json'}"]))


def default_run(preset: str, data: str) -> str:
    """my-PRESET, with other data than the Shapes world also their folder's name; no published run is called so."""
    folder = re.sub(r"[^\w-]+", "-", Path(data).name).strip("-")[:60]
    preset = Path(preset).stem
    return f"my-{preset}" if data == "shapes" else f"my-{preset}-{folder or 'images'}"


def parse_parameter(text: str, known: dict[str, object]) -> tuple[str, object]:
    """KEY=VALUE for papermill: of the kind of its default in `known`, a text, a number, or a whole number from 0.

    Raises ClipgenError: not KEY=VALUE, an unknown key, or no such number where one is needed.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise ClipgenError(f"parameter {text!r} is not KEY=VALUE: write for example -p SEED=1")
    if key not in known:
        raise ClipgenError(f"no notebook has a parameter {key!r}: choose from {', '.join(sorted(known))}")
    kind = type(known[key])
    try:
        parsed = kind(value)
    except ValueError:
        parsed = -1
    if kind is not str and not 0 <= parsed <= MOST_SEED:
        wanted = "a number from 0" if kind is float else "a whole number from 0 to 2^63 - 1"
        raise ClipgenError(f"parameter {key} is {shortened(repr(value), 80)}: give {wanted}")
    return key, parsed


def parameters_of(name: str) -> dict[str, object]:
    """Names of a notebook's parameters and their defaults: texts, whole numbers and floats."""
    import papermill

    with warnings.catch_warnings(action="ignore"):
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
        # a kernel has a session of its own, where no Ctrl-C, closed terminal or SIGTERM of this command comes; it saves first
        kernels = lambda: [kernel.send_signal(signal.SIGINT) for kernel in psutil.Process().children()]
        with runs.stoppable(kernels) as stop:
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
            given = re.findall(r"=(/[^\s'\"]+)", values.get("OVERRIDES", ""))
            for path in filter(Path.is_absolute, map(Path, [*given, *(values.get(key, "") for key in PATHS)])):
                text = text.replace(str(path), path.name)  # a copy names the data, not where they lie on this machine
            nbformat.write(tidied(nbformat.reads(text, as_version=4)), output)
    if stop.number:
        raise runs.Stopped(stop.number, f"in {name}")
    if stopped:
        raise ClipgenError(f"{name}: {stopped}")


def tidied(notebook):
    """A notebook without what only a running kernel shows (widgets, animations), without stderr and notes that name this machine."""
    live = {"application/vnd.jupyter.widget-view+json", "image/gif"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and not live & set(o.get("data", {}))]
    for part in (notebook, *notebook.cells):
        for key in ("papermill", "execution", "widgets"):
            part.metadata.pop(key, None)
    return notebook


@main.command("sweep")
@click.argument("name")
@PRESET
@SET
@click.option("--grid", multiple=True, metavar="PART.FIELD=VALUE,VALUE", help="a field and its values")
@click.option("--seeds", type=click.IntRange(1), default=1, help="trainings of each combination of values")
@click.option("--jobs", type=click.IntRange(1), default=1, help="runs at a time, on several GPUs one after the other")
@DATA
@CLIP
@DEVICE
def sweep(name: str, preset: str, changes: tuple[str, ...], jobs: int, **options) -> str:
    """Make a run for each combination of values, results/NAME/<cell>, and a table of them. Stages in common are made once.

    The same command resumes; with another grid it keeps the runs that are there and adds the new ones.
    """
    from .study.compare import table_text
    from .study.sweep import COLUMNS, Sweep

    cells = options.pop("grid"), options.pop("seeds")
    plan = replace(Sweep.checked(name, preset, shlex.join(changes), cells, **options), jobs=jobs)
    failed, rows = plan.run(), plan.table()
    shown = table_text(rows, [column for column in COLUMNS if any(column in row for row in rows)])
    if failed:
        click.echo(shown)
        sentences = "; ".join(f"{cell}: {sentence}" for cell, sentence in failed.items())
        raise ClipgenError(f"{len(failed)} of {len(plan.cells)} cells failed: {sentences}")
    return f"{shown}\nruns: clipgen runs {name}   numbers: {plan.folder / 'table.json'}"


@main.command("runs")
@click.argument("sweep", default="")
@click.option("--sort", default="", metavar="FIELD", help="rising, such as evaluation.caps  [default: by name]")
@click.option("--where", multiple=True, metavar="FIELD=VALUE", help="only these, such as transformer.width=128")
def list_runs(sweep: str, sort: str, where: tuple[str, ...]) -> str:
    """Print the runs under results/, or those of SWEEP: the fields of their presets that differ, and the main metrics.

    A FIELD is any of config.json or summary.json, with dots.
    """
    from .study.sweep import SHOWN, chosen, differing

    table = chosen(clipgen_lib.Workbench.runs(sweep), where, sort)
    asked = [text.partition("=")[0] for text in (*where, sort)]
    shown = [name for name in dict.fromkeys([*differing(table), *asked, *SHOWN]) if name in table]
    lines = table[shown].convert_dtypes().to_string(float_format="{:.4g}".format, na_rep="-")
    return lines if len(table) else "there are no such runs"
