"""The project's own promises: packages in step, light and layered imports, notebooks as they should be saved."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT
from speedrun import GOAL, table_text

import clipgen_lib
from clipgen_lib import cli
from clipgen_lib.config import load_preset
from clipgen_lib.evaluate import frechet_distance
from clipgen_lib.metrics.report import table

PACKAGE = ROOT / "clipgen_lib"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LAYERS = """
    runtime config clip_embed data vqgan transformer training train_vqgan store train_transformer sample text_to_image
    metrics evaluate plots prompt_box study.released workbench study doctor cli __main__
"""


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, at its top or inside functions; those for types only are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            modules = {base / alias.name for alias in node.names if (base / f"{alias.name}.py").is_file()} or {base}
            found |= {".".join(module.relative_to(PACKAGE).parts) for module in modules}
    return found


def test_a_module_imports_only_modules_above_it():
    """The order of a reading; inside a folder any order, but no circle."""
    layers, graph = LAYERS.split(), {}
    layer_of = lambda name: layers.index(name if name in layers else name.split(".")[0])
    for path in (path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        graph[name], layer = imports(path), layer_of(name)
        for other in graph[name]:
            imported = layer_of(other)
            assert imported < layer or (imported == layer and "." in other), (name, other)
    list(TopologicalSorter(graph).static_order())  # raises where there is a circle


def test_environment_and_pyproject_are_in_step():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed, extras = project["dependencies"], project["optional-dependencies"]
    wanted = needed + sum(extras.values(), [])
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert next(d["pip"] for d in conda if isinstance(d, dict)) == list(dict.fromkeys(wanted))
    assert f"python{project['requires-python']}" in conda
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", p) for p in wanted), "lower bounds only"
    oldest = set((ROOT / "tests" / "oldest.txt").read_text().splitlines())
    assert {p.replace(">=", "==") for p in needed + extras["notebooks"] + extras["test"]} <= oldest


def test_names_that_others_rely_on():
    names = "TextToImage Workbench VQGAN ImageTransformer TokenStore ClipEmbedder open_images load_preset generate"
    assert all(callable(getattr(clipgen_lib, name)) for name in names.split())
    assert callable(frechet_distance)


def test_import_is_light():
    code = "import sys"
    absent = {"clipgen_lib": "torch pydantic", "clipgen_lib.cli": "torch papermill", "clipgen_lib.sample": "ipywidgets"}
    for module, names in absent.items():
        code += f"\nimport {module}\nassert not set({names.split()}) & set(sys.modules), '{module}'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_readme_names_what_exists():
    text, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    assert "make test" in text and "make test" in (ROOT / ".ci" / "run").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)\b", text)) - {"it", "a", "the"}:
        assert f"\n{target}:" in makefile, target
    for preset in set(re.findall(r"(?:--preset|PRESET=)\s*([a-z0-9.]+)", text)) - {"mine.yaml"}:
        load_preset(preset)
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (ROOT / path).exists(), path


def test_the_notebooks_are_those_of_the_command():
    names = ["00_quickstart", *cli.NOTEBOOKS, "05_compare", "06_speed", "appendix_train_clip"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_form(path):
    notebook = nbformat.read(path, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    counts = [c.execution_count for c in code]
    assert counts == list(range(1, len(code) + 1)), "run once, top to bottom, in a fresh kernel"
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    assert "widgets" not in notebook.metadata and path.stat().st_size < 1_000_000
    assert code[1].metadata.tags == ["parameters"]
    for line in code[1].source.splitlines():
        assert re.fullmatch(r'[A-Z_]+ = ("[^"=]*"|[\d.]+)(  # [^=]*)?', line), line
    assert re.match(r"# .+\n\n> \*\*In:\*\*", notebook.cells[0].source)
    assert sum(len(c.source.splitlines()) for c in code) <= 120
    text = "\n".join(c.source for c in code).replace("# auto, cpu, cuda, cuda:1", "")
    assert not re.search(r"^\s*(class |!|%)|import \*|cuda|\.backward\(", text, re.M)
    assert text.count("assert ") >= 2 and not re.search(r"[\"'](/|[A-Z]:\\)", text)
    assert not any(o.get("name") == "stderr" for c in code for o in c.outputs), "warnings or bars among the outputs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_is_an_output(path):
    """A link in the text is broken where JupyterLab's root is the folder of the notebooks."""
    cells = nbformat.read(path, as_version=4).cells
    assert not any("![" in cell.source for cell in cells if cell.cell_type == "markdown")
    for cell in cells:
        if re.search(r"\.keep\(|plots\.saved\(", cell.source):
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
    sources = "\n".join(cell.source for cell in cells)
    for name, run in re.findall(r'^plots\.saved\("(\w+)"(?:, "([\w-]+)")?\)$', sources, re.M):
        assert (ROOT / "results" / (run or "reference") / "figures" / f"{name}.png").is_file(), name


@pytest.mark.parametrize("run", ["reference", "laptop", "fashion"])
def test_tables_of_runs_are_what_the_command_prints_for_them(run):
    summary = json.loads((ROOT / "results" / run / "summary.json").read_text())
    assert table(summary) in (ROOT / "results" / "README.md").read_text()


def test_the_table_of_the_readme_comes_from_results():
    def cells(oracle: dict, caps: str) -> str:
        one, two, unseen = (oracle[kind] for kind in ("one", "two", "held_out"))
        shares = (one["colour"], one["shape"], two["both"], unseen["colour"], unseen["shape"])
        return " | ".join([*(f"{share:.1%}" for share in shares), caps]).strip() + " |"

    found = [json.loads((ROOT / "results" / run / "summary.json").read_text()) for run in ("reference", "laptop")]
    first, second = (cells(run["oracle"]["text"], f"{run['evaluation']['caps']:.3f}") for run in found)
    best = cells(found[0]["export"]["oracle"]["16"], "")
    wanted = [first, best, second, f"| {found[0]['evaluation']['caps_ceiling']:.3f} |"]
    section = (ROOT / "README.md").read_text().split("## What it reaches")[1].split("## ")[0]
    rows = re.findall(r"^\| .* \|$", section, re.M)[1:]
    assert len(rows) == 4 and all(row.endswith(cells) for row, cells in zip(rows, wanted, strict=True)), rows
    photos = json.loads((ROOT / "results" / "fashion" / "summary.json").read_text())["evaluation held_out"]["classes"]
    shares = f"right in {photos['accuracy']:.0%} of all such images, and\nin {photos['real']:.0%} of real photos"
    assert shares in (ROOT / "README.md").read_text()


def test_the_table_of_the_speedrun_is_what_its_script_prints():
    rows = json.loads((ROOT / "results" / "speedrun" / "table.json").read_text())
    assert table_text(rows) in (ROOT / "results" / "README.md").read_text()
    for row in rows:
        assert row["median_seconds"] in row["seconds"] and len(row["seconds"]) == len(row["seeds"]) == len(
            row["of_seeds"]
        )
        assert row["reached"] == all(min(one[key] for one in row["of_seeds"]) >= least for key, least in GOAL.items())
