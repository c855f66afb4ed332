import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

from lorakit.adapter.config import LoRAConfig
from lorakit.config import Config, DtypeName, Place, dtype_name, read_yaml
from lorakit.errors import ConfigError
from lorakit.training.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(Config):
    size: int = 1
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(Config):
    aliases: ClassVar[Mapping[str, str]] = {"lr": "rate"}
    switches: ClassVar[Mapping[str, tuple[str, str, str]]] = {"use_b": ("kind", "b", "a")}
    advice: ClassVar[Mapping[str, str]] = {"fast": "set rate to 1"}

    path: str
    rate: float = 1e-3
    flag: bool = False
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    table: dict[str, int] = dataclasses.field(default_factory=dict)
    part: Part = dataclasses.field(default_factory=Part)

    def problems(self):
        return ["rate: must be positive"] if self.rate <= 0 else []


FULL = Whole(path="x", rate=2.0, flag=True, kind="b", limit=3, table={"a": 1}, part=Part(size=2, names=("n", "m")))


def test_dict_and_yaml_give_the_same_config_back(tmp_path):
    assert Whole.from_dict(FULL.to_dict()) == FULL
    file = tmp_path / "c.yaml"
    file.write_text(FULL.to_yaml())
    assert Whole.from_yaml(file) == FULL


def test_yaml_keeps_the_order_of_the_fields():
    assert [line.split(":")[0] for line in FULL.to_yaml().splitlines() if line[0].isalpha()] == list(FULL.to_dict())


@pytest.mark.parametrize(
    "config", [LoRAConfig(), LoRAConfig(layers=(0, 2), target_modules=("q",), rank_pattern={"q": 2})]
)
def test_real_configs_come_back(config):
    assert LoRAConfig.from_dict(config.to_dict()) == config
    train = TrainConfig(model="m", data="d", output="o", lora=config)
    assert TrainConfig.from_dict(train.to_dict()) == train


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rate", "0.1"),
        ("rate", True),
        ("rate", float("nan")),
        ("rate", float("inf")),
        ("limit", 1.0),
        ("limit", True),
        ("flag", 1),
        ("flag", "yes"),
        ("kind", "c"),
        ("path", Path("x")),
        ("table", {"a": "1"}),
        ("table", {1: 1}),
        ("part", {"size": "1"}),
        ("part", [1]),
        ("names", {"a", 1}),
    ],
)
def test_a_wrong_type_is_an_error_that_names_the_field(field, value):
    with pytest.raises(ConfigError, match=rf"Whole: 1 problem:\n  - {field}: .*\(got"):
        Whole(**{"path": "x", field: value})


def test_an_int_is_a_float_a_list_a_tuple_and_a_set_a_sorted_one():
    assert Whole(path="x", rate=1).rate == 1.0
    assert Part(names=["a", "b"]).names == ("a", "b")
    assert Part(names={"b", "a"}).names == Part(names=frozenset({"b", "a"})).names == ("a", "b")


def test_a_mapping_is_a_nested_config_over_its_default_here():
    assert Whole(path="x", part={"size": 3}).part == Part(size=3)
    assert Whole(path="x").replace(part={"size": 3}).part == Part(size=3)
    assert TrainConfig(model="m", data="d", lora={"alpha": 8.0}).lora == LoRAConfig(r=8, alpha=8.0)
    with pytest.raises(ConfigError, match=r"lora: unknown key 'rang'; did you mean rank"):
        TrainConfig(model="m", data="d", lora={"rang": 4})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places(Config):
    place: Place
    other: Place | None = None
    dtype: DtypeName = "auto"


def test_a_path_is_text_where_a_place_is_wanted():
    config = Places(place=Path("a") / "b", other=Path("c"))
    assert (config.place, config.other) == (str(Path("a") / "b"), "c")
    assert Places.from_dict(config.to_dict()) == config
    train = TrainConfig(
        model=Path("m"), data=Path("d"), output=Path("o"), validation=Path("v"), chat_template=Path("t")
    )
    assert (train.model, train.data, train.output, train.validation, train.chat_template) == ("m", "d", "o", "v", "t")
    with pytest.raises(ConfigError, match="place: "):
        Places(place=1)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        *((each, each) for each in ("auto", "fp32", "bf16", "fp16")),
        *(("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16"), ("half", "fp16")),
        *(("torch.bfloat16", "bf16"), (torch.float32, "fp32"), (torch.half, "fp16")),
    ],
)
def test_dtypes_in_every_usual_spelling(given, name):
    assert dtype_name(given) == Places(place="x", dtype=given).dtype == name
    assert TrainConfig.from_dict({"model": "m", "data": "d", "torch_dtype": given}).dtype == name


@pytest.mark.parametrize("given", ["float8", "torch.float64", torch.float64, 16, None])
def test_what_is_no_dtype_for_a_base_is_refused(given):
    with pytest.raises(ConfigError, match=r"dtype: Input should be 'auto', 'fp32'"):
        Places(place="x", dtype=given)


def test_values_as_peft_and_transformers_write_them():
    assert LoRAConfig(modules_to_save=None, target_modules={"v", "q"}, exclude_modules=("k",)) == LoRAConfig(
        target_modules=("q", "v"), exclude_modules=("k",)
    )
    assert LoRAConfig.from_dict({"init_lora_weights": True, "use_rslora": True}) == LoRAConfig(scaling="rslora")
    assert LoRAConfig.from_dict({"use_rslora": False}) == LoRAConfig()
    assert TrainConfig(model="m", data="d", max_steps=-1).max_steps is None
    for field, value in (("modules_to_save", "head"), ("init", False), ("scaling", True)):
        with pytest.raises(ConfigError, match=f"{field}: "):
            LoRAConfig(**{field: value})
    for steps in (-2, -1.0):
        with pytest.raises(ConfigError, match="max_steps: "):
            TrainConfig(model="m", data="d", max_steps=steps)


def test_a_switch_sets_its_field():
    assert Whole.from_dict({"path": "x", "use-b": True}).kind == "b"
    assert Whole.from_dict({"path": "x", "use_b": False}).kind == "a"
    with pytest.raises(ConfigError, match=r"use_b: expected true or false \(got 'b'\)"):
        Whole.from_dict({"path": "x", "use_b": "b"})
    with pytest.raises(ConfigError, match="'use_b' sets 'kind' a second time"):
        Whole.from_dict({"path": "x", "kind": "a", "use_b": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Config):
    lora: LoRAConfig = dataclasses.field(default_factory=lambda: LoRAConfig(scaling="rslora"))


def test_a_switch_counts_as_given_over_a_nested_default():
    assert Outer(lora={"use_rslora": False}).lora.scaling == "lora"


def test_a_setting_of_another_library_says_what_to_do_instead():
    with pytest.raises(ConfigError, match="unknown key 'fast': set rate to 1"):
        Whole.from_dict({"path": "x", "fast": True})
    with pytest.raises(ConfigError, match="unknown key 'bf16': set dtype to bf16"):
        TrainConfig.from_dict({"model": "m", "data": "d", "bf16": True})


@pytest.mark.parametrize("cls", [TrainConfig, LoRAConfig])
def test_no_name_is_both_a_setting_and_none(cls):
    fields = {field.name for field in dataclasses.fields(cls)}
    spellings = [*fields, *cls.aliases, *cls.switches, *cls.advice]
    assert len(spellings) == len(set(spellings))
    assert {*cls.aliases.values(), *(field for field, _, _ in cls.switches.values())} <= fields


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_share": 0}, "validation_share: must be above 0 and below 1 .got 0.0.; .* set a small share"),
        ({"validation_share": 1}, "validation_share: must be above 0 and below 1"),
        ({"resume": True}, "resume: needs output, the folder of the run"),
        ({"method": "dpo"}, "method: Input should be 'sft'"),
        ({"save_total_limit": 1}, "keep_checkpoints: must be at least 2"),
    ],
)
def test_ranges_of_a_run(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict({"model": "m", "data": "d", **changes})


def test_ranges_are_checked_after_types():
    with pytest.raises(ConfigError, match="rate: must be positive"):
        Whole(path="x", rate=0)


def test_unknown_keys_name_the_nearest():
    with pytest.raises(ConfigError, match=r"c\.yaml: 2 problems:\n  - unknown key 'limmit'; did you mean limit"):
        Whole.from_dict({"path": "x", "limmit": 1, "zzzz": 1}, where="c.yaml")


def test_every_problem_of_a_dict_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        Whole.from_dict({"ratte": 1, "kind": "c", "part": {"sise": 1, "size": "2"}})
    assert len(caught.value.problems) == 5
    for part in [
        "'ratte'; did you mean rate",
        "kind: ",
        "part: unknown key 'sise'",
        "part: size: ",
        "'path' is required",
    ]:
        assert part in str(caught.value)


def test_a_field_given_twice_is_refused():
    with pytest.raises(ConfigError, match="'rate' sets 'rate' a second time"):
        Whole.from_dict({"path": "x", "lr": 1.0, "rate": 2.0})


def test_hyphens_and_aliases_are_accepted():
    assert LoRAConfig.from_dict({"lora-r": 4, "lora-alpha": 8, "init-lora-weights": "gaussian"}) == LoRAConfig(
        r=4, alpha=8, init="gaussian"
    )


def test_configs_are_frozen_and_replace_checks_again():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.rate = 1.0
    assert FULL.replace(rate=3.0).rate == 3.0
    with pytest.raises(ConfigError):
        FULL.replace(rate=-1.0)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("2E4", 2e4), ("-1e+2", -100.0), ("1.5e-5", 1.5e-5), (".5", 0.5)]
)
def test_yaml_reads_numbers_as_people_write_them(tmp_path, text, value):
    file = tmp_path / "c.yaml"
    file.write_text(f"rate: {text}\n")
    assert read_yaml(file) == {"rate": value}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\na: 2\n", "given twice"),
        (b"b:\n  a: 1\n  a: 2\n", "given twice"),
        (b"- 1\n- 2\n", "expected 'key: value' lines, found list"),
        (b"", "expected 'key: value' lines, found NoneType"),
        (b"a: [1\n", "not readable as YAML"),
        (b"a: !!python/object/apply:os.getcwd []\n", "not readable as YAML"),
        (b"\xff\xfe\x00", "not readable as YAML"),
        (b"? [1, 2]\n: 3\n? {a: 1}\n: 2\n", "not readable as YAML"),
    ],
)
def test_bad_yaml_is_refused(tmp_path, content, message):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(file)


def test_missing_yaml(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
