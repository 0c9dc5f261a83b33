from clipgen_lib.metrics.report import score_table, table

SCORES = {
    "protocol": "clip-FID with shapes",
    "reference": "shapes/val",
    "resolution": 64,
    "n": 24,
    "n_reference": 12,
    "fid": {"0": 12.0, "1": 3.5},
    "rfid": {},
    "floor": {"0": 1.25, "1": 0.5},
    "warnings": ["few images"],
}


def test_lines_only_for_what_was_measured():
    text = score_table(SCORES)
    assert text.splitlines()[0] == "clip-FID with shapes, N = 24 against 12 (shapes/val), 64 px"
    assert [line.split() for line in text.splitlines()[1:4]] == [
        ["k", "=", "0", "k", "=", "1"],
        ["FID-k", "12", "3.5"],
        ["FID-k,", "reference", "halves", "1.25", "0.5"],
    ]
    assert text.endswith("warning: few images") and "CapS" not in text and "KID" not in text
    empty = score_table({**SCORES, "fid": {}, "floor": {}, "missing": ["protocol 'inception' needs a file"]})
    assert "k =" not in empty and "missing: protocol 'inception'" in empty


def test_captions_stand_between_their_references():
    fit = {"caps": 0.3, "caps_shuffled": 0.1, "clip_score": 30.0, "r_precision": 0.5, "judged": 20, "judge": "shapes"}
    text = score_table(SCORES | fit)
    assert "with captions of other images 0.100" in text and "chance about 0.05" in text
    real = {"caps_ceiling": 0.8, "caps_floor": 0.05, "r_precision_real": 0.9}
    assert "0.300   (real with own captions 0.800, with others' 0.050)" in score_table(SCORES | fit | real)


def test_the_table_of_a_run():
    kinds = {"one": {"n": 16, "colour": 0.75, "shape": 0.5}}
    scores = SCORES | {"card": {"protocol": "clip", "k": [0, 1], "scored": {"name": "a", "n": 24}, "captions": None}}
    summary = {"run": "x", "preset": "smoke", "seed": 1, "evaluation": scores}
    text = table(summary | {"oracle": {"text": kinds}, "export": {"oracle": {"16": kinds}}})
    assert text.startswith("run x   preset smoke   seed 1") and "scored" not in text
    sure = {"one": {key: 0.5 for key in "abcdef"} | {"n": 16, "a_interval": [0.25, 0.755]}}
    assert table(summary | {"oracle": {"text": sure}}).splitlines()[-2:] == [
        "oracle, text one            a 50.0% (25.0 to 75.5)   b 50.0%   c 50.0%   d 50.0%   e 50.0%",
        " " * 28 + "f 50.0%   (n = 16)",
    ]
    assert text.count("colour 75.0%   shape 50.0%   (n = 16)") == 2 and "export, best of 16 one" in text
    lines = [" ".join(line.split()) for line in score_table(scores).splitlines()]
    assert {"k 0, 1", "scored name a, n 24", "captions none"} <= set(lines)
