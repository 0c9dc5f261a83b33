import pytest

from clipgen_lib import runs
from clipgen_lib.runs import ClipgenError, read_json, write_json
from clipgen_lib.workbench import Workbench


def test_a_run_from_before_a_field_existed_had_its_default(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    bench = Workbench.open("smoke", "old")
    config = read_json(bench.run.path / "config.json")
    del config["preset"]["sample"]["neighbours"]  # 0 is the default and the preset's
    write_json(bench.run.path / "config.json", config)
    assert Workbench.open("smoke", "old").preset == bench.preset
    del config["preset"]["sample"]["top_p"]  # the default is 1, the preset's is not
    write_json(bench.run.path / "config.json", config)
    with pytest.raises(ClipgenError, match=r"begun with another preset\.sample\.top_p"):
        Workbench.open("smoke", "old")
