"""What an evaluation found, as lines a person can read."""


def table(summary: dict) -> str:
    """The numbers of a run's summary.json: evaluation, oracle and export."""
    lines = [
        f"run {summary['run']}   preset {summary.get('preset')}   seed {summary.get('seed')}",
        score_table(summary["evaluation"], with_card=False),
    ]
    readings = {f"oracle, {modality}": kinds for modality, kinds in summary.get("oracle", {}).items()}
    readings |= {f"export, best of {n}": kinds for n, kinds in summary.get("export", {}).get("oracle", {}).items()}
    for label, kinds in readings.items():
        for kind, scores in kinds.items():
            shares = "   ".join(f"{key} {100 * value:.1f}%" for key, value in scores.items() if key != "n")
            lines.append(f"{label + ' ' + kind + ' ':28}{shares}   (n = {scores['n']})")
    return "\n".join(lines)


def score_table(scores: dict, with_card: bool = True) -> str:
    """What `evaluate.score_images` gives, each line only where it was measured, with the protocol card below it."""
    radii = {
        "FID-k": scores["fid"],
        "rFID-k, tokenizer": scores.get("rfid", {}),
        "FID-k, reference halves": scores["floor"],
    }
    lines = [
        f"{scores['protocol']}, N = {scores['n']} against {scores['n_reference']} ({scores['reference']}), {scores['resolution']} px",
        *_radius_lines({label: values for label, values in radii.items() if values}),
        *_set_lines(scores),
        *(_caption_lines(scores) if "caps" in scores else ()),
    ]
    if c := scores.get("classes"):
        line = f"{'class accuracy':28}{c['accuracy']:.3f}   (real images {c['real']:.3f}"
        line += f", the tokenizer's decodings {c['reconstruction']:.3f}" if "reconstruction" in c else ""
        lines.append(f"{line}; by a classifier of real images)")
    if with_card and "card" in scores:
        lines += [f"  {key:26}{_text(value)}" for key, value in scores["card"].items()]
    lines += [f"missing: {sentence}" for sentence in scores.get("missing", [])]
    lines += [f"warning: {sentence}" for sentence in scores["warnings"]]
    return "\n".join(lines)


def _radius_lines(rows: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"{label:28}" + "".join(f"{value:<12.4g}" for value in values.values()) for label, values in rows.items()]
    if rows:
        lines.insert(0, f"{'':28}" + "".join(f"k = {k:<8}" for k in next(iter(rows.values()))))
    return lines


def _set_lines(scores: dict) -> list[str]:
    """KID, precision and so on."""
    lines = []
    if kid := scores.get("kid"):
        subsets = f"{kid['subsets']} subsets of {kid['subset_size']}"
        lines.append(f"{'KID':28}{kid['mean']:.4g} ± {kid['std']:.2g}   ({subsets})")
    if m := scores.get("manifold"):
        of = f"(of {m['n']} images of either set)"
        lines.append(f"{'precision, recall':28}{m['precision']:.3f}, {m['recall']:.3f}   {of}")
        lines.append(f"{'density, coverage':28}{m['density']:.3f}, {m['coverage']:.3f}")
    if score := scores.get("inception_score"):
        lines.append(f"{'Inception Score':28}{score['mean']:.3f} ± {score['std']:.2g}   ({score['splits']} splits)")
    if curve := scores.get("fid_over_n"):
        lines.append(f"{'FID-0 over N':28}" + "   ".join(f"{n}: {value:.4g}" for n, value in curve.items()))
    return lines


def _caption_lines(scores: dict) -> list[str]:
    between, real = f"with captions of other images {scores['caps_shuffled']:.3f}", ""
    if "caps_ceiling" in scores:
        ceiling, floor = scores["caps_ceiling"], scores["caps_floor"]
        between = f"real with own captions {ceiling:.3f}, with others' {floor:.3f}"
        real = f"real images {scores['r_precision_real']:.3f}, "
    chance = f"chance about {1 / min(100, scores['judged']):.2g}"
    return [
        f"{'CapS':28}{scores['caps']:.3f}   ({between})",
        f"{'R-precision':28}{scores['r_precision']:.3f}   ({real}{chance})",
        f"{'CLIPScore':28}{scores['clip_score']:.2f}",
        f"{'evaluation CLIP':28}{scores['judge']}",
    ]


def _text(value: object) -> str:
    """An entry of the protocol card on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "none")
