"""Methods compared: real runs of a tiny model, in processes of their own."""

import json

import pytest
from click.testing import CliRunner

from lorakit.cli import main
from lorakit.cli.compare import seconds
from lorakit.comparison import compare, parse_method
from lorakit.comparison.summary import Mean, Trial, rows_of, table
from lorakit.errors import ConfigError, RunError
from tiny_runs import save_base, save_data


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    train, valid = map(str, save_data(tmp_path_factory.mktemp("data")))
    base = str(save_base(tmp_path_factory.mktemp("base")))
    return {
        "model": base,
        "data": train,
        "validation": valid,
        "max_steps": 3,
        "batch_size": 8,
        "samples": 0,
        "dtype": "fp32",
    }


def trial(method, rate, seed, loss, **scores):
    return Trial(
        method=method,
        rate=rate,
        seed=seed,
        loss=loss,
        seconds=60.0,
        memory=10**9,
        trained=1000,
        file=4000,
        scores=scores,
    )


def test_the_rate_is_chosen_on_the_first_seed_and_means_are_over_seeds_at_it():
    trials = [
        trial("a", 1e-3, 0, 1.0),
        trial("a", 3e-3, 0, 0.8, bleu=50.0),
        trial("a", 9e-3, 0, 0.9),
        trial("a", 3e-3, 1, 1.4, bleu=54.0),
        trial("b", 1e-4, 0, 1.05),
    ]
    first, second = rows_of(trials, 0)
    assert (first.method, second.method) == ("b", "a")
    assert second.rate == 3e-3
    assert not second.at_edge
    assert second.sweep == {1e-3: 1.0, 3e-3: 0.8, 9e-3: 0.9}
    assert second.loss.value == pytest.approx(1.1)
    # two values 0.6 apart: s = 0.4243, t = 12.71 with one degree of freedom
    assert second.loss.half == pytest.approx(12.71 * 0.6 / 2**0.5 / 2**0.5)
    assert second.scores["bleu"].value == 52.0
    assert first.loss == Mean(1.05, None, 1)
    assert table([first])[1][2] == "1.050"
    edge = rows_of([trial("a", 1e-3, 0, 0.7), trial("a", 3e-3, 0, 0.8)], 0)[0]
    assert edge.at_edge


def test_methods_are_names_with_settings():
    assert parse_method("lora").settings == {}
    assert parse_method("dora:r=64:alpha=16").settings == {"lora": {"delta": "dora", "r": 64, "alpha": 16}}
    assert parse_method("lora:target_modules=[q_proj, v_proj]:epochs=2").settings == {
        "lora": {"target_modules": ["q_proj", "v_proj"]},
        "epochs": 2,
    }
    with pytest.raises(ConfigError, match="no method 'doora'; nearest: dora"):
        parse_method("doora")
    with pytest.raises(ConfigError, match="'r64' is no setting=value"):
        parse_method("lora:r64")


def test_runs_are_made_once_and_a_comparison_goes_on(settings, tmp_path):
    told = []
    arguments = (settings, ["lora:r=4", "full"], tmp_path / "c")
    options = {"rates": [1e-3, 4e-3], "seeds": 2, "test": settings["validation"], "metrics": ["loss"]}
    result = compare(*arguments, **options, on_stage=told.append)
    assert [row.loss.number for row in result.rows] == [2, 2]
    assert {row.method for row in result.rows} == {"lora:r=4", "full"}
    by_name = {row.method: row for row in result.rows}
    assert by_name["full"].trained > by_name["lora:r=4"].trained
    assert by_name["full"].file > by_name["lora:r=4"].file
    assert all(set(row.sweep) == {1e-3, 4e-3} and row.at_edge for row in result.rows)
    assert all(row.memory > 10**8 and "loss" in row.scores for row in result.rows)
    assert any("edge of what was tried" in note for note in result.notes)
    page = (tmp_path / "c" / "compare.html").read_text()
    assert "<svg" in page
    assert "lora:r=4" in page
    assert (tmp_path / "c" / "table.md").read_text().startswith("| method | rate | valid loss | test loss |")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("result.json") if path.parent.name != "c"}
    assert len(files) == 6  # two rates and one more seed each
    again = compare(*arguments, **options)
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert again.to_dict() == result.to_dict()
    with pytest.raises(RunError, match=r"(?s)another comparison.*rates: then \[0.001, 0.004\], now \[0.002\]"):
        compare(*arguments, **{**options, "rates": [2e-3]})


def test_no_run_is_begun_that_would_not_end_in_the_budget(settings, tmp_path):
    result = compare(settings, ["lora", "rslora"], tmp_path / "c", rates=[1e-3, 2e-3], seeds=3, budget=1e-3)
    assert len(result.missing) > 0
    assert all("the time was up" in each for each in result.missing)


def test_what_is_wrong_is_told_before_the_first_run(settings, tmp_path):
    with pytest.raises(ConfigError, match="method dora"):
        compare({**settings, "lora": {"lora_bias": True}}, ["lora", "dora"], tmp_path / "c")
    with pytest.raises(ConfigError, match="name each method once"):
        compare(settings, ["lora", "lora"], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("")
    with pytest.raises(RunError, match="something else is there"):
        compare(settings, ["lora"], tmp_path / "used")


def test_the_command_prints_a_table(settings, tmp_path):
    arguments = ["compare", settings["data"], "--valid", settings["validation"], "--model", settings["model"]]
    arguments += ["--methods", "lora", "--rates", "1e-3", "--seeds", "1", "--output", str(tmp_path / "c")]
    arguments += ["--set", "max_steps=2", "--set", "samples=0", "--set", "lora={r: 2}", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    lines = result.stderr.splitlines()
    assert lines[0].split()[:2] == ["method", "rate"]
    assert lines[1].split()[:2] == ["lora", "0.001"]
    assert json.loads(result.stdout)["methods"][0]["trained"] > 0
    assert [seconds(text) for text in ("90s", "1.5m", "2 h")] == [90.0, 90.0, 7200.0]
    with pytest.raises(ConfigError, match="write a number and s, m or h"):
        seconds("soon")
