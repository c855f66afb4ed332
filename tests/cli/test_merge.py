"""`lorakit merge` as typed."""

import json

from click.testing import CliRunner

from lorakit.cli.merge import command


def test_merge(base, adapter, tmp_path):
    run = CliRunner().invoke(command, ["--adapter", str(adapter), "--output", str(tmp_path / "m"), "--json"])
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["proof"]["passed"] is True
    assert result["how"] == "streamed"
    assert (tmp_path / "m/tokenizer.json").is_file()
    again = CliRunner().invoke(command, ["--adapter", str(adapter), "--output", str(tmp_path / "m")])
    assert again.exit_code == 2
    assert "exists; choose another folder" in again.stderr


def test_wrong_flags(adapter, tmp_path):
    for flags, message in [
        (["--weights", "a"], "--weights: numbers with commas"),
        (["--metric", "loss"], "--metric needs --data"),
        (["--weights", "1,2"], "weights: 2 for 1 adapters"),
    ]:
        run = CliRunner().invoke(command, ["--adapter", str(adapter), "--output", str(tmp_path / "m"), *flags])
        assert run.exit_code == 2
        assert message in run.stderr
