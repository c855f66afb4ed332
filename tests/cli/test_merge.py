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


def test_requantise(tmp_path, monkeypatch):
    import gguf

    import lorakit
    from gguf_files import write_gguf
    from lorakit import models
    from tiny_models import byte_tokenizer, tiny_llama

    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    model = tiny_llama(vocabulary=len(byte_tokenizer()), hidden_size=64, intermediate_size=64)
    spec = write_gguf(tmp_path / "tiny.gguf", model, gguf.GGMLQuantizationType.Q8_0)
    handle = lorakit.attach(models.load_weights(spec, "fp32", "cpu"), lorakit.LoRAConfig(r=4))
    for parameter in handle.trainable_parameters():
        parameter.data.fill_(0.02)
    handle.save("default", tmp_path / "adapter")
    arguments = ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "m"), "--requantize", "--json"]
    run = CliRunner().invoke(command, arguments)
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["how"], result["model"]) == ("requantised", "tiny-merged.gguf")
    assert "of each weight: merge_certificate.json" in run.stderr
    assert f"lorakit chat --model {tmp_path / 'm/tiny-merged.gguf'}" in run.stderr
