"""Evaluation: features -> statistics -> distance, and how well an image fits its text.

In: a generator and a split with captions, or any two folders of images. Out: numbers, each with the protocol card that
says how it was made. The feature network and the blur are part of a metric's name; weights that are not there are named
among what is missing, and never replaced by others.
"""

from __future__ import annotations


def table(summary: dict) -> str:
    """The numbers of a summary as lines a person can read."""
    e = summary["evaluation"]
    lines = [
        f"run {summary['run']}   preset {summary.get('preset')}   seed {summary.get('seed')}",
        f"{e['protocol']}, N = {e['n']} drawn against {e['n_reference']} real ({e['reference']}), {e['resolution']} px",
        *_radius_lines(
            {"FID-k, generator": e["fid"], "rFID-k, tokenizer": e["rfid"], "FID-k, real halves": e["floor"]}
        ),
        *_set_lines(e),
    ]
    if "caps" in e:
        lines += [*_caption_lines(e, e["n"]), f"{'judge':28}{e['judge']}"]
    if c := e.get("classes"):
        lines.append(
            f"{'class accuracy':28}{c['accuracy']:.3f}   (real images {c['real']:.3f}, the tokenizer's decodings {c['reconstruction']:.3f}; by a classifier of real images)"
        )
    readings = {f"oracle, {modality}": kinds for modality, kinds in summary.get("oracle", {}).items()}
    readings |= {f"export, best of {n}": kinds for n, kinds in summary.get("export", {}).get("oracle", {}).items()}
    for label, kinds in readings.items():
        for kind, scores in kinds.items():
            shares = "   ".join(f"{key} {100 * value:.1f}%" for key, value in scores.items() if key != "n")
            lines.append(f"{label + ' ' + kind + ' ':28}{shares}   (n = {scores['n']})")
    lines += [f"missing: {sentence}" for sentence in e.get("missing", [])]
    lines += [f"warning: {sentence}" for sentence in e["warnings"]]
    return "\n".join(lines)


def folder_table(result: dict) -> str:
    """What `evaluate_folder` found as lines a person can read: each protocol with its whole card."""
    lines = [f"{result['images']} against {result['reference']}, {result['resolution']} px"]
    for name, scores in result["protocols"].items():
        lines += [
            "",
            f"protocol {name}",
            *_radius_lines({"FID-k": scores["fid"], "FID-k, reference halves": scores.get("floor", {})}),
        ]
        lines += [*_set_lines(scores), *_card_lines(scores["card"])]
        lines += [f"warning: {sentence}" for sentence in scores["warnings"]]
    if c := result.get("captions"):
        lines += [
            "",
            *_caption_lines(c, c["judged"]),
            f"{'CLIPScore':28}{c['clip_score']:.2f}",
            f"{'judge':28}{c['judge']}",
        ]
    lines += [f"missing: {sentence}" for sentence in result["missing"].values()]
    lines += [f"warning: {sentence}" for sentence in result["warnings"]]
    return "\n".join(lines)


def _radius_lines(rows: dict[str, dict[str, float]]) -> list[str]:
    rows = {label: values for label, values in rows.items() if values}
    if not rows:
        return []
    head = f"{'':28}" + "".join(f"k = {k:<8}" for k in next(iter(rows.values())))
    return [
        head,
        *(f"{label:28}" + "".join(f"{value:<12.4g}" for value in values.values()) for label, values in rows.items()),
    ]


def _set_lines(scores: dict) -> list[str]:
    """KID, precision and so on, each line only where it was measured."""
    lines = []
    if kid := scores.get("kid"):
        lines.append(
            f"{'KID':28}{kid['mean']:.4g} ± {kid['std']:.2g}   ({kid['subsets']} subsets of {kid['subset_size']})"
        )
    if m := scores.get("manifold"):
        lines.append(
            f"{'precision, recall':28}{m['precision']:.3f}, {m['recall']:.3f}   (of {m['n']} images of either set)"
        )
        lines.append(f"{'density, coverage':28}{m['density']:.3f}, {m['coverage']:.3f}")
    if score := scores.get("inception_score"):
        lines.append(f"{'Inception Score':28}{score['mean']:.3f} ± {score['std']:.2g}   ({score['splits']} splits)")
    if curve := scores.get("fid_over_n"):
        lines.append(f"{'FID-0 over N':28}" + "   ".join(f"{n}: {value:.4g}" for n, value in curve.items()))
    return lines


def _caption_lines(scores: dict, n: int) -> list[str]:
    known = "caps_ceiling" in scores
    real = (
        f"real with own captions {scores['caps_ceiling']:.3f}, with others' {scores['caps_floor']:.3f}"
        if known
        else f"with captions of other images {scores['caps_shuffled']:.3f}"
    )
    precision = f"real images {scores['r_precision_real']:.3f}, " if known else ""
    return [
        f"{'CapS':28}{scores['caps']:.3f}   ({real})",
        f"{'R-precision':28}{scores['r_precision']:.3f}   ({precision}chance about {1 / min(100, n):.2g})",
    ]


def _card_lines(card: dict) -> list[str]:
    """The protocol card, an entry a line; nested entries on the line of their own."""

    def text(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {inner}" for key, inner in value.items())
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return [
        f"  {key:26}{text(value) if value is not None else 'none'}" for key, value in card.items() if key != "protocol"
    ]
