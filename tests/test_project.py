"""The project's own promises: packages in step, light import, notebooks as they should be saved."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_environment_and_pyproject_are_in_step():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [p for extra in project["optional-dependencies"].values() for p in extra]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert next(d["pip"] for d in conda if isinstance(d, dict)) == list(dict.fromkeys(wanted))
    assert f"python{project['requires-python']}" in conda
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", p) for p in wanted), "lower bounds only"


def test_import_is_light():
    code = "import sys, clipgen_lib; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    code = "import sys, clipgen_lib.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_notebooks_are_those_of_the_command():
    from clipgen_lib.cli import NOTEBOOKS as ordered

    assert [p.stem for p in NOTEBOOKS] == [
        "00_quickstart",
        *ordered,
        "05_compare",
        "06_scale",
        "06_speed",
        "appendix_train_clip",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_form(path):
    notebook = nbformat.read(path, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), (
        "run once, top to bottom, in a fresh kernel"
    )
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    assert "widgets" not in notebook.metadata and path.stat().st_size < 500_000
    assert code[1].metadata.tags == ["parameters"]
    for line in code[1].source.splitlines():
        assert re.fullmatch(r'[A-Z_]+ = ("[^"=]*"|[\d.]+)(  # [^=]*)?', line), line
    assert re.match(r"# .+\n\n> \*\*In:\*\*", notebook.cells[0].source)
    assert sum(len(c.source.splitlines()) for c in code) <= 120
    text = "\n".join(c.source for c in code)
    assert not re.search(
        r"^\s*(class |!|%)|import \*|cuda|\.backward\(", text.replace("# auto, cpu, cuda, cuda:1", ""), re.M
    )
    assert text.count("assert ") >= 2 and not re.search(r"[\"'](/|[A-Z]:\\)", text)
    assert not any(o.get("name") == "stderr" for c in code for o in c.outputs), "warnings or bars among the outputs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_pictures_of_reference_runs_exist(path):
    for target in re.findall(r"!\[\]\((.+?)\)", path.read_text()):
        assert (path.parent / target).is_file(), target


def test_tables_of_runs_come_from_results():
    """The result tables are what the command prints for the committed runs."""
    from clipgen_lib.metrics.report import table

    pages = {"reference": "README.md", "laptop": "results/README.md", "tiny-imagenet-20": "results/README.md"}
    for run, page in pages.items():
        summary = json.loads((ROOT / "results" / run / "summary.json").read_text())
        assert table(summary) in (ROOT / page).read_text()


def test_cost_comes_from_the_presets():
    """What the README says of COCO is the committed file, and the files are what the presets cost now."""
    from clipgen_lib.config import load_preset
    from clipgen_lib.cost import lines_of, project

    committed = json.loads((ROOT / "results" / "cost" / "coco.json").read_text())
    assert lines_of(committed) in (ROOT / "README.md").read_text()
    for name in ("coco", "imagenet"):
        for was in json.loads((ROOT / "results" / "cost" / f"{name}.json").read_text()):
            given = (was[key] for key in ("images", "peak", "gpus", "share", "decoded"))
            assert project(load_preset(name), *given) == was


def test_speed_comes_from_results():
    from clipgen_lib.wb import lines_of

    found = json.loads((ROOT / "results" / "speed" / "cpu.json").read_text())
    page = (ROOT / "results" / "README.md").read_text()
    assert lines_of(found) in page
    for name, run in (("before", "laptop"), ("after", "laptop-fast")):
        summary = json.loads((ROOT / "results" / run / "summary.json").read_text())
        seconds, oracle = summary["seconds"], summary["oracle"]["text"]
        assert (
            f"{name:7} {seconds['total']:.0f} s: tokenizer {seconds['vqgan']:.0f}, store {seconds['extract']:.0f}, "
            in page
        )
        assert f"shape {oracle['one']['shape']:.1%}; two: both {oracle['two']['both']:.1%}" in page


def test_comparison_tables_come_from_results():
    """The blocks are lines of the tables that the committed rows make; of the ablation some."""
    from clipgen_lib.study.compare import TABLES, entries, lines_of

    blocks = re.findall(r"```\n( +\w.*?)\n```", (ROOT / "results" / "README.md").read_text(), re.DOTALL)
    for name in ("ablation", "systems", "photos"):
        table = TABLES[name]
        made = entries(ROOT / "results" / name, table.rows)
        assert made == json.loads((ROOT / "results" / name / "table.json").read_text()) and len(made) == len(table.rows)
        lines = lines_of(made, table.columns).splitlines()
        block = next(block for block in blocks if block.startswith(lines[0]))
        assert len(block.splitlines()) > 5 and set(block.splitlines()) <= set(lines)
