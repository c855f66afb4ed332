import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from lorakit.cli import VERBS, main


def test_help_lists_every_verb_and_imports_nothing_heavy():
    program = (
        "import sys, lorakit.cli\n"
        "sys.argv = ['lorakit', '--help']\n"
        "try:\n    lorakit.cli.main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print('HEAVY', [name for name in ('torch', 'transformers', 'matplotlib', 'numpy') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for verb, (_, help_line) in VERBS.items():
        assert verb in result.stdout
        assert help_line.split()[0] in result.stdout
    assert result.stdout.endswith("HEAVY []\n")


def test_unknown_verb_names_the_nearest():
    result = CliRunner().invoke(main, ["trian"])
    assert result.exit_code == 2
    assert "No such verb: 'trian'. Did you mean train" in result.stderr


def test_verb_unlike_any_other_lists_them_all():
    result = CliRunner().invoke(main, ["zzzzzz"])
    assert result.exit_code == 2
    assert "Verbs: demo, check, plan, targets, train" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "--json"], "No such verb: 'trian'. Did you mean train or extract?"),
        (["--bogus", "train", "--json"], "No such option '--bogus'"),
        (["--json"], "No such option '--json'"),
        (["train", "--bogus", "--json"], "No such option '--bogus'"),
    ],
)
def test_wrong_usage_is_an_object_with_json_wherever_it_is_found(arguments, message):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["error"]["type"] == "UsageError"
    assert message in json.loads(line)["error"]["message"]
    assert message in result.stderr


def test_a_verb_that_cannot_be_imported_is_an_object_with_json(monkeypatch):
    monkeypatch.setitem(VERBS, "broken", ("lorakit.cli.no_such_module", "Broken."))
    result = CliRunner().invoke(main, ["broken", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "ModuleNotFoundError"


def test_version():
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("lorakit, version 0.1.0")


def test_module_is_the_command():
    result = subprocess.run([sys.executable, "-m", "lorakit", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("lorakit, version")


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_answers_help_without_torch(verb):
    program = (
        f"import sys, lorakit.cli\nsys.argv = ['lorakit', {verb!r}, '--help']\n"
        "try:\n    lorakit.cli.main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print('HEAVY', [name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--json" in result.stdout
    assert "--config" in result.stdout
    assert result.stdout.endswith("HEAVY []\n")
