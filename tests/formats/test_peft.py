"""PEFT's files, both ways, against PEFT itself; and what a bad file says."""

import json
import shutil
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from adapter.models import CASES, randomise
from lorakit import Adapter, LoRAConfig
from lorakit.errors import AdapterFileError, AdapterMismatchError
from lorakit.files import read_safetensors_header
from lorakit.formats.peft import CONFIG_FILE, TENSOR_FILE

SETTINGS = {
    "plain": {},
    "rslora": {"scaling": "rslora", "alpha": 5.0},
    "bias": {"bias": "all"},
    "lora bias": {"lora_bias": True, "alpha": 5.0},
    "dora": {"delta": "dora", "alpha": 5.0},
}  # fmt: skip

with_peft = pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((n, s) for n in ("llama", "gpt2", "mlp") for s in ("plain", "rslora")),
        *(("llama embedding", "plain"), ("bert", "plain"), ("bert", "bias"), ("vit", "plain"), ("mlp", "bias")),
        *(("convolutions", "plain"), ("embedding", "rslora"), ("gpt2", "bias")),
        *((n, "lora bias") for n in ("llama", "gpt2", "mlp", "bert", "vit", "convolutions")),
        *((n, "dora") for n in ("llama", "llama embedding", "gpt2", "mlp", "bert", "vit", "convolutions", "embedding")),
    ],
)


def lora_config(name: str, setting: str) -> LoRAConfig:
    what = CASES[name].what
    if name == "convolutions":  # PEFT's A ignores the layer's dilation and pads with zeros whatever its padding_mode
        what = {"target_modules": ("one", "two", "three")}
        if setting == "dora":  # and PEFT cannot add its A for all channels to the weight of a grouped one
            what = {"target_modules": ("one", "three")}
    return LoRAConfig(**{"r": 4, "alpha": 8.0, **what, **SETTINGS[setting]})


def quiet_peft(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of its own deprecations and of GPT-2's transposed layers
        return function(*args, **kwargs)


@with_peft
def test_peft_reads_our_files_and_computes_what_we_compute(name, setting, tmp_path):
    case = CASES[name]
    model = case.build()
    handle = lorakit.attach(model, lora_config(name, setting))
    randomise(handle)
    ours = case.run(model)
    handle.save("default", tmp_path / "a")
    handle.detach()
    theirs = case.run(quiet_peft(peft.PeftModel.from_pretrained, model, tmp_path / "a").eval())
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@with_peft
def test_we_read_peft_files_and_compute_what_peft_computes(name, setting, tmp_path):
    case = CASES[name]
    config = lora_config(name, setting)
    theirs = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        target_modules=list(config.target_modules)
        if isinstance(config.target_modules, tuple)
        else config.target_modules,
        use_rslora=config.scaling == "rslora",
        bias=config.bias,
        lora_bias=config.lora_bias,
        use_dora=config.delta == "dora",
    )
    wrapped = quiet_peft(peft.get_peft_model, case.build(), theirs)
    torch.manual_seed(3)
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora_" in n or (config.bias == "all" and n.endswith("bias")):
                p.add_(torch.randn_like(p) * 0.2)
    expected = case.run(wrapped.eval())
    quiet_peft(wrapped.save_pretrained, tmp_path / "a", save_embedding_layers=False)
    model = case.build()
    lorakit.attach(model, tmp_path / "a")
    torch.testing.assert_close(case.run(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "setting"), [(n, s) for n in ("llama", "gpt2", "embedding") for s in ("plain", "dora")]
)
def test_gradients_are_pefts(name, setting, tmp_path):
    case = CASES[name]
    model = case.build()
    handle = lorakit.attach(model, lora_config(name, setting))
    randomise(handle)
    handle.save("default", tmp_path / "a")
    case.run(model).sin().sum().backward()
    theirs = quiet_peft(peft.PeftModel.from_pretrained, case.build(), tmp_path / "a", is_trainable=True).eval()
    case.run(theirs).sin().sum().backward()
    ends = {
        "A": ("lora_A.default.weight", "lora_embedding_A.default"),
        "magnitude": ("lora_magnitude_vector.default.weight",),
    }
    ends["B"] = tuple(end.replace("_A", "_B") for end in ends["A"])
    named = dict(theirs.named_parameters())
    for own, tensor in handle.trainable_tensors().items():
        path, _, letter = own.rpartition(".")
        names = [f"base_model.model.{path}.{end}" for end in ends[letter]]
        other = next(named[name] for name in names if name in named)
        torch.testing.assert_close(tensor.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mlp"])
def test_rank_and_alpha_patterns_mean_the_same_to_peft(name, tmp_path):
    case = CASES[name]
    ends = {"llama": "up_proj", "gpt2": "c_fc", "mlp": "first"}
    model = case.build()
    config = LoRAConfig(
        r=4, alpha=8.0, target_modules="all-linear", rank_pattern={ends[name]: 2}, alpha_pattern={ends[name]: 3.0}
    )
    handle = lorakit.attach(model, config)
    randomise(handle)
    expected = case.run(model)
    handle.save("default", tmp_path / "a")
    theirs = quiet_peft(peft.PeftModel.from_pretrained, handle.detach(), tmp_path / "a")
    torch.testing.assert_close(case.run(theirs.eval()), expected, rtol=1e-5, atol=1e-5)


def test_modules_to_save_both_ways(tmp_path):
    case = CASES["vit"]
    model = case.build()
    handle = lorakit.attach(model, LoRAConfig(r=2, target_modules=("q_proj",), modules_to_save=("classifier",)))
    randomise(handle)
    expected = case.run(model)
    handle.save("default", tmp_path / "ours")
    theirs = quiet_peft(peft.PeftModel.from_pretrained, handle.detach(), tmp_path / "ours")
    torch.testing.assert_close(case.run(theirs.eval()), expected)
    quiet_peft(theirs.save_pretrained, tmp_path / "theirs")
    model = case.build()
    lorakit.attach(model, tmp_path / "theirs")
    torch.testing.assert_close(case.run(model), expected)


@pytest.mark.parametrize("name", CASES)
def test_saving_what_was_loaded_gives_the_same_bytes(name, tmp_path):
    model = CASES[name].build()
    handle = lorakit.attach(model, lora_config(name, "plain"))
    randomise(handle)
    handle.save("default", tmp_path / "a")
    Adapter.load(tmp_path / "a").save(tmp_path / "b")
    lorakit.attach(handle.detach(), tmp_path / "b", name="x").save("x", tmp_path / "c")
    for file in (CONFIG_FILE, TENSOR_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()


def test_ranks_that_no_pattern_tells_are_written_as_patterns(tmp_path):
    handle = lorakit.attach(CASES["mlp"].build(), LoRAConfig(r=4))
    randomise(handle)
    value = handle.extract()
    f = value.factors["first"]
    value.factors["first"] = type(f)(A=f.A[:2], B=f.B[:, :2], alpha=f.alpha / 2)
    value.save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a")
    torch.testing.assert_close(again.delta("first"), value.delta("first"))
    lorakit.attach(handle.detach(), again)


# ---------------------------------------------------------------- bad files


@pytest.fixture
def folder(tmp_path):
    handle = lorakit.attach(CASES["llama"].build(), LoRAConfig(r=2, alpha=4.0))
    randomise(handle)
    return handle.save("default", tmp_path / "adapter")


def change_config(folder, **changes):
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**values, **changes}))


def change_tensors(folder, change):
    tensors = load_file(folder / TENSOR_FILE)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / TENSOR_FILE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"init_lora_weights": "pissa"}, "changed the base"),
        ({"lora_bias": True}, r"lora_B\.bias is missing"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias: goes with init"),
        ({"lora_bias": "yes"}, "lora_bias: Input should be a valid boolean"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"something_new": 3}, "something_new is 3"),
        ({"r": "four"}, "r: Input should be a valid integer"),
        ({"r": 8}, "rank 2 in the tensors, 8 in the config"),
        ({"bias": "some"}, "bias"),
    ],
)
def test_settings_that_would_change_the_function_are_refused_by_name(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(AdapterFileError, match=message):
        Adapter.load(folder)


def test_every_bad_tensor_is_listed_in_one_error(folder):
    def spoil(tensors):
        keys = sorted(tensors)
        del tensors[next(k for k in keys if "q_proj.lora_B" in k)]
        tensors[next(k for k in keys if "k_proj.lora_A" in k)][0, 0] = float("nan")
        tensors["base_model.model.surprise.weight"] = torch.zeros(3)
        tensors[next(k for k in keys if "v_proj.lora_B" in k).replace("weight", "bias")] = torch.zeros(3)
        tensors["no_prefix.lora_A.weight"] = torch.zeros(3)

    change_tensors(folder, spoil)
    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(folder)
    text = str(caught.value)
    assert all(
        word in text
        for word in (
            *("q_proj: lora_B is missing", "surprise.weight: unexpected", "does not begin with"),
            "v_proj: lora_B.bias is unexpected; the config's lora_bias is off",
        )
    )


def test_nan_and_all_zero_updates_are_refused(folder):
    change_tensors(folder, lambda t: next(iter(t.values())).fill_(float("inf")))
    with pytest.raises(AdapterFileError, match="NaN or infinite"):
        Adapter.load(folder)
    change_tensors(folder, lambda t: [x.zero_() for k, x in t.items() if "lora_B" in k or not x.isfinite().all()])
    with pytest.raises(AdapterFileError, match="zero in every layer"):
        Adapter.load(folder)


def test_missing_unexpected_and_misshapen_tensors_are_told_when_attaching(folder):
    model = CASES["llama"].build()
    value = Adapter.load(folder)
    path = "model.layers.0.self_attn.q_proj"
    f = value.factors.pop("model.layers.1.mlp.up_proj")
    value.factors["model.layers.9.mlp.up_proj"] = f
    q = value.factors[path]
    value.factors[path] = type(q)(A=q.A[:, :-1], B=q.B, alpha=q.alpha)
    with pytest.raises(AdapterMismatchError) as caught:
        lorakit.attach(model, value)
    text = str(caught.value)
    assert "missing: model.layers.1.mlp.up_proj.A" in text
    assert "unexpected: model.layers.9.mlp.up_proj.A" in text
    assert "shape: model.layers.0.self_attn.q_proj.A is (2, 31) in the adapter, (2, 32) in the model" in text
    assert not any("lorakit" in k for k in model.state_dict())


def test_damaged_files_and_wrong_places_say_what_is_there(folder, tmp_path):
    data = (folder / TENSOR_FILE).read_bytes()
    for cut in (b"", data[:4], data[:100], data[:-10], data + b"x", b"\xff" * 300):
        (folder / TENSOR_FILE).write_bytes(cut)
        with pytest.raises(AdapterFileError, match=TENSOR_FILE):
            Adapter.load(folder)
    (folder / TENSOR_FILE).write_bytes(data)
    (folder / CONFIG_FILE).write_text('{"r": 2, "r": 3}')
    with pytest.raises(AdapterFileError, match="given twice"):
        Adapter.load(folder)
    with pytest.raises(AdapterFileError, match=r"did you mean .*adapter"):
        Adapter.load(tmp_path / "adaptr")
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json not in it"):
        Adapter.load(folder)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterFileError, match="pickle"):
        Adapter.load(tmp_path / "old")


def test_an_adapter_saved_under_a_name_is_found_by_the_hint(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "outer" / "sql")
    with pytest.raises(AdapterFileError, match="adapters are in its folders sql"):
        Adapter.load(tmp_path / "outer")


def test_the_file_is_what_peft_expects(folder):
    tensors, metadata = read_safetensors_header(folder / TENSOR_FILE)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert metadata["format"] == "pt"
    assert all(dtype == "F32" for dtype, _ in tensors.values())
    values = json.loads((folder / CONFIG_FILE).read_text())
    assert values["task_type"] == "CAUSAL_LM"
    assert values["r"] == 2
    assert values["lora_alpha"] == 4
    assert "lora_bias" not in values


def test_an_unknown_format_writes_nothing(folder, tmp_path):
    with pytest.raises(AdapterFileError, match="unknown adapter format 'onnx'"):
        Adapter.load(folder).save(tmp_path / "x", format="onnx")
    assert not (tmp_path / "x").exists()
