"""What an evaluation measured, as lines a person can read."""

from collections.abc import Iterator


def table(summary: dict) -> str:
    """The numbers of a run's summary.json: evaluation, oracle and export."""
    lines = [f"run {summary['run']}   preset {summary.get('preset')}   seed {summary.get('seed')}"]
    lines += [score_table(scores, with_card=False) for key, scores in summary.items() if key.startswith("evaluation")]
    readings = {f"oracle, {modality}": kinds for modality, kinds in summary.get("oracle", {}).items()}
    readings |= {f"export, best of {n}": kinds for n, kinds in summary.get("export", {}).get("oracle", {}).items()}
    for label, kinds in readings.items():
        for kind, scores in kinds.items():
            first, *more = _shares(scores)
            lines += [f"{label + ' ' + kind + ' ':28}{first}", *(f"{'':28}{line}" for line in more)]
    return "\n".join(lines)


def _shares(scores: dict) -> list[str]:
    """The shares of one kind of prompt, five to a line, with their 95% intervals where they have some."""
    texts = []
    for key, value in scores.items():
        if key != "n" and not key.endswith("_interval"):
            low, high = scores.get(f"{key}_interval", (None, None))
            spread = "" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})"
            texts.append(f"{key} {100 * value:.1f}%{spread}")
    lines = ["   ".join(texts[i : i + 5]) for i in range(0, len(texts), 5)]
    return [*lines[:-1], f"{lines[-1]}   (n = {scores['n']})"]


def score_table(scores: dict, with_card: bool = True) -> str:
    """What `evaluate.score_images` gives, each line only where it was measured, with the protocol card below it."""
    protocol, n, of, size = (scores[key] for key in ("protocol", "n", "n_reference", "resolution"))
    lines = [f"{protocol}, N = {n} against {of} ({scores['reference']}), {size} px"]
    if scores["fid"]:
        lines.append(f"{'':28}" + "".join(f"k = {k:<8}" for k in scores["fid"]))
    lines += [f"{label:27} {text}" for label, text in _rows(scores)]
    if with_card and "card" in scores:
        lines += [f"  {key:26}{_text(value)}" for key, value in scores["card"].items()]
    lines += [f"missing: {sentence}" for sentence in scores.get("missing", [])]
    lines += [f"warning: {sentence}" for sentence in scores["warnings"]]
    return "\n".join(lines)


def _rows(scores: dict) -> Iterator[tuple[str, str]]:
    """Label and text of each metric that was measured."""
    for label, key in (("FID-k", "fid"), ("rFID-k, tokenizer", "rfid"), ("FID-k, reference halves", "floor")):
        if values := scores.get(key):
            yield label, "".join(f"{value:<12.4g}" for value in values.values())
    for label, key in (("FID-0", "fid"), ("KID", "kid"), ("MIND", "mind"), ("CMMD", "cmmd")):
        if f"{key}_interval" in scores:
            value = {"fid": scores["fid"].get("0"), "kid": scores.get("kid", {}).get("mean")}.get(key, scores.get(key))
            yield f"{label}, 95% interval", f"{value:.4g}{_between(scores, key, '.4g')}"
    if kid := scores.get("kid"):
        subsets = f"{kid['subsets']} subsets of {kid['subset_size']}"
        yield "KID", f"{kid['mean']:.4g} ± {kid['std']:.2g}   ({subsets})"
    if m := scores.get("manifold"):
        yield (
            "precision, recall",
            f"{m['precision']:.3f}{_between(m, 'precision')}, {m['recall']:.3f}{_between(m, 'recall')}   (of {m['n']} images of either set)",
        )
        yield "density, coverage", f"{m['density']:.3f}, {m['coverage']:.3f}"
    if score := scores.get("inception_score"):
        yield "Inception Score", f"{score['mean']:.3f} ± {score['std']:.2g}   ({score['splits']} splits)"
    if curve := scores.get("fid_over_n"):
        yield "FID-0 over N", "   ".join(f"{n}: {value:.4g}" for n, value in curve.items())
    if "caps" in scores:
        yield from _caption_rows(scores)
        prefix = scores.get("caption_prefix")
        yield "evaluation CLIP", scores["judge"] + (f", captions behind {prefix!r}" if prefix else "")
    if nll := scores.get("nll"):
        yield "NLL a token", f"{nll['text']:.4f} given a caption, {nll['image']:.4f} given the image (of {nll['n']})"
    for judge, fit in scores.get("judges", {}).items():
        yield from _caption_rows(fit)
        yield "evaluation CLIP", judge
    if c := scores.get("classes"):
        for label, of in {"class": c, **c.get("attributes", {})}.items():
            decoded = f", the tokenizer's decodings {of['reconstruction']:.3f}" if "reconstruction" in of else ""
            real = f"real images {of['real']:.3f}{decoded}; by a classifier of real images"
            yield f"{label} accuracy", f"{of['accuracy']:.3f}{_between(of, 'accuracy')}   ({real})"
    if near := scores.get("nearest"):
        for label, kind in ((f"nearest of {near['n_train']} trained on", near), ("the same by pixels", near["pixels"])):
            share = f"{100 * kind['share_nearer_than_real']:.1f}% nearer than any real image"
            yield label, f"{kind['median']:.3f}   (real images {kind['median_real']:.3f}; {share})"
    for protocol, found in scores.get("also", {}).items():
        yield from ((f"{protocol}: {label}", text) for label, text in _rows(found))


def _caption_rows(fit: dict) -> Iterator[tuple[str, str]]:
    """What one CLIP says of captions and images."""
    between, real = f"with captions of other images {fit['caps_shuffled']:.3f}", ""
    if "caps_ceiling" in fit:
        between = f"real with own captions {fit['caps_ceiling']:.3f}, with others' {fit['caps_floor']:.3f}"
        real = f"real images {fit['r_precision_real']:.3f}, "
    yield "CapS", f"{fit['caps']:.3f}{_between(fit, 'caps')}   ({between})"
    chance = f"{real}chance about {1 / min(100, fit['judged']):.2g}"
    yield "R-precision", f"{fit['r_precision']:.3f}{_between(fit, 'r_precision')}   ({chance})"
    yield "CLIPScore", f"{fit['clip_score']:.2f}"


def _between(scores: dict, key: str, form: str = ".3f") -> str:
    low, high = scores.get(f"{key}_interval", (None, None))
    return "" if low is None else f" ({low:{form}} to {high:{form}})"


def _text(value: object) -> str:
    """An entry of the protocol card on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "none")
