"""The time from nothing to a generator that does what it is told: `make speedrun CHANGE="..."`, or `python tests/speedrun.py`.

For each seed the commands of a preset make the Shapes world, the tokenizer, the token store and the transformer in an empty folder,
in processes of their own, and the oracle reads one image for each of 512 prompts of a kind that no other evaluation asks. A row of
results/speedrun/table.json has the wall seconds of all that, without the evaluation, and their median; the oracle's shares, and the
least of them over the seeds; the config; and the machine's own rate at a matrix product, by which seconds of two machines compare.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = ("train-vqgan", "extract", "train-transformer")
GOAL = {"colour": 0.99, "shape": 0.95, "two_both": 0.40}  # one object, one object, both of two objects


def seconds_of(command: list[str], environment: dict) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "clipgen_lib", *command], env=environment, check=True, cwd=ROOT)
    return time.perf_counter() - start


def oracle(run: str, seed: int) -> dict[str, float]:
    """The oracle's shares of 512 prompts of one and of two objects; for a process that has the run's results."""
    from clipgen_lib import Workbench
    from clipgen_lib.evaluate import evaluate_oracle

    wb = Workbench.reopen(run)
    found = evaluate_oracle(wb.generator(), wb.run.path / "generated", 512, 1_000_000 + seed, ("text",))["text"]
    return {"colour": found["one"]["colour"], "shape": found["one"]["shape"], "two_both": found["two"]["both"]}


def run_seed(folder: Path, seed: int, facts: dict) -> dict:
    """Seconds of each stage of a seed, and what the oracle says; as they are there where an interrupted command came that far."""
    path, preset = folder / "made.json", facts["preset"]
    if path.exists() and (found := json.loads(path.read_text()))["of"] == facts:
        return found["made"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = {**os.environ, "CLIPGEN_RESULTS": str(folder), "CLIPGEN_DATA": str(folder / "data")}
    options = ["--preset", preset, "--run", preset, "--seed", str(seed)]
    options += [part for change in facts["set"] for part in ("--set", change)]
    seconds = {stage: seconds_of([stage, *options], environment) for stage in STAGES}
    asked = [sys.executable, __file__, "--oracle", preset, "--seeds", str(seed)]
    answer = subprocess.run(asked, env=environment, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    shares = json.loads(answer.stdout.splitlines()[-1])
    made = {"stages": seconds, "seconds": sum(seconds.values()), **shares}
    path.write_text(json.dumps({"of": facts, "made": made}))
    return made


def table_text(rows: list[dict]) -> str:
    """The rows as text: median seconds, the least share over the seeds, and GFLOP/s of a product of matrices in two precisions."""
    lines = [("date", "seconds", "seeds", "colour", "shape", "two both", "float32", "bfloat16", "change")]
    for row in rows:
        rates = [f"{row['matmul_gflops'][dtype]:.0f}" for dtype in ("float32", "bfloat16")]
        shares = [f"{row[key]:.1%}" for key in GOAL]
        lines.append(
            (row["date"], f"{row['median_seconds']:.0f}", str(len(row["seeds"])), *shares, *rates, row["change"])
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--change", default="as it is", help="what is new, for the table")
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="PART.FIELD=VALUE")
    parser.add_argument("--oracle", help=argparse.SUPPRESS)  # of a run of this name, by the processes of `run_seed`
    given = parser.parse_args()
    if given.oracle:
        print(json.dumps(oracle(given.oracle, given.seeds[0])))
        return
    from speed import machine

    from clipgen_lib.runtime.runs import RESULTS, refuse_published, write_json

    folder = RESULTS / "speedrun"
    refuse_published(folder)
    path, rates = folder / "table.json", machine("cpu")["matmul_gflops"]
    facts = {"change": given.change, "preset": given.preset, "set": given.changes}
    made = [run_seed(folder / "runs" / str(seed), seed, facts) for seed in given.seeds]
    row = {"date": date.today().isoformat(), **facts}
    row |= {"seeds": given.seeds, "seconds": [round(one["seconds"], 1) for one in made]}
    row |= {"median_seconds": statistics.median(row["seconds"]), **{key: min(one[key] for one in made) for key in GOAL}}
    row |= {"reached": all(row[key] >= least for key, least in GOAL.items()), "matmul_gflops": rates}
    config = json.loads((folder / "runs" / str(given.seeds[0]) / given.preset / "config.json").read_text())
    row |= {"cores": os.cpu_count(), "of_seeds": made, "config": config["preset"]}
    rows = [*(json.loads(path.read_text()) if path.exists() else []), row]
    write_json(path, rows)
    for seed in given.seeds:  # the row is written: the same command trains anew
        (folder / "runs" / str(seed) / "made.json").unlink()
    print(table_text(rows))


if __name__ == "__main__":
    main()
