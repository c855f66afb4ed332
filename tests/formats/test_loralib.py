"""loralib's state dicts, both ways, against loralib itself on the same tensors."""

import pickle
import zipfile

import loralib
import pytest
import torch
from torch import nn

import lorakit
from adapter.models import randomise
from lorakit import Adapter, LoRAConfig
from lorakit.errors import AdapterFileError
from lorakit.files import write_safetensors
from lorakit.formats import BaseFacts, Context, load_adapter, obstacles, recognise, save_adapter

# name -> (layer of loralib, the plain layer it stands for, settings they share, an input)
LAYERS = {
    "linear": (loralib.Linear, nn.Linear, (12, 20), {}),
    "embedding": (loralib.Embedding, nn.Embedding, (30, 12), {}),
    "merged": (loralib.MergedLinear, nn.Linear, (12, 24), {"enable_lora": [True, False, True]}),
    "merged all": (loralib.MergedLinear, nn.Linear, (12, 24), {"enable_lora": [True, True, True]}),
    "merged one": (loralib.MergedLinear, nn.Linear, (12, 24), {"enable_lora": [False, True]}),
    "convolution": (loralib.Conv2d, nn.Conv2d, (6, 8, 3), {"padding": 1}),
    "convolution 1x1": (loralib.Conv2d, nn.Conv2d, (6, 8, 1), {}),
    "convolution of groups": (loralib.Conv2d, nn.Conv2d, (6, 8, 3), {"groups": 2}),
    "convolution of channels": (loralib.Conv2d, nn.Conv2d, (6, 6, 3), {"groups": 6}),
    "convolution 1d": (loralib.Conv1d, nn.Conv1d, (6, 8, 1), {}),
}


class Holder(nn.Module):
    """One layer with a name, as in a model."""

    def __init__(self, layer):
        super().__init__()
        self.inner = nn.ModuleDict({"layer": layer})

    def forward(self, x):
        return self.inner["layer"](x)


def pair(name, r=4, alpha=6.0):
    """(loralib's layer with random factors, the plain one), with the same weights."""
    theirs, ours, sizes, settings = LAYERS[name]
    torch.manual_seed(0)
    a = Holder(theirs(*sizes, r=r, lora_alpha=alpha, **settings))
    b = Holder(ours(*sizes, **{k: v for k, v in settings.items() if k != "enable_lora"}))
    with torch.no_grad():
        for n, p in a.named_parameters():
            if "lora_" in n:
                p.normal_(0, 0.3)
    state = {k.replace(".conv.", "."): v for k, v in a.state_dict().items() if "lora_" not in k}
    b.load_state_dict(state)
    return a, b


def input_of(name):
    torch.manual_seed(1)
    if name == "embedding":
        return torch.randint(0, 30, (2, 7))
    if name.startswith("convolution"):
        return torch.randn(2, 6, 9) if "1d" in name else torch.randn(2, 6, 9, 9)
    return torch.randn(2, 5, 12)


def context_of(model, name="linear", **settings):
    enabled = LAYERS[name][3].get("enable_lora")
    enable_lora = tuple(enabled) if enabled and not all(enabled) else None
    return Context(base=BaseFacts.of(model), enable_lora=enable_lora, **{"alpha": 6.0, **settings})


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_we_read_loralib_files_and_compute_what_loralib_computes(name, suffix, tmp_path):
    theirs, model = pair(name)
    state = loralib.lora_state_dict(theirs)
    file = tmp_path / f"lora{suffix}"
    torch.save({"model_state_dict": state}, file) if suffix == ".pt" else write_safetensors(file, state)
    assert recognise(file) == "loralib"
    x = input_of(name)
    expected = theirs(x)
    adapter = load_adapter(file, context=context_of(model, name))
    lorakit.attach(model, adapter)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    plain = LAYERS[name][1] is not nn.Conv2d or "1x1" in name
    assert adapter.config.r == (4 if plain and "merged" not in name else adapter.factors["inner.layer"].r)


@pytest.mark.parametrize("name", [n for n in LAYERS if "groups" not in n and "channels" not in n and "merged" not in n])
@pytest.mark.parametrize("suffix", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_loralib_reads_our_files_and_computes_what_we_compute(name, suffix, scaling, tmp_path):
    theirs, model = pair(name)
    handle = lorakit.attach(model, LoRAConfig(r=4, alpha=6.0, scaling=scaling, target_modules=["layer"]))
    randomise(handle)
    adapter, x = handle.extract(), input_of(name)
    file = adapter.save(tmp_path / suffix, "loralib")
    state = torch.load(file, weights_only=True) if suffix.endswith("pt") else lorakit.files.read_safetensors(file)[0]
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert not any("lora_" in key for key in missing.missing_keys)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in LAYERS if "merged" not in n and "groups" not in n and "channels" not in n])
def test_what_we_wrote_is_read_back_exactly_and_written_again_to_the_byte(name, tmp_path):
    _, model = pair(name)
    handle = lorakit.attach(model, LoRAConfig(r=4, alpha=6.0, target_modules=["layer"], bias="none"))
    randomise(handle)
    adapter = handle.extract()
    handle.detach()
    adapter.save(tmp_path / "a.safetensors", "loralib")
    again = Adapter.load(tmp_path / "a.safetensors", model=model)  # our files tell alpha
    f, expected = again.factors["inner.layer"], adapter.factors["inner.layer"]
    assert torch.equal(f.A, expected.A)
    assert torch.equal(f.B, expected.B)
    assert (f.alpha, f.kind) == (expected.alpha, expected.kind)
    again.save(tmp_path / "b.safetensors", "loralib")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    adapter.save(tmp_path / "a.pt", "loralib")
    again.save(tmp_path / "b.pt", "loralib")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize("name", ["linear", "convolution"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_both_ways(name, bias, tmp_path):
    theirs, model = pair(name)
    layer = theirs.inner["layer"]
    with torch.no_grad():
        (layer.conv if name == "convolution" else layer).bias.add_(1.0)
    torch.save(loralib.lora_state_dict(theirs, "all"), tmp_path / "a.pt")  # its lora_only leaves out a convolution's
    adapter = load_adapter(tmp_path / "a.pt", context=context_of(model))
    assert adapter.config.bias == "lora_only"
    lorakit.attach(model, adapter)
    x = input_of(name)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    if name == "linear":  # loralib's form of the convolution's factors has none of the same size in ours
        file = adapter.save(tmp_path / "b.pt", "loralib")
        fresh, _ = pair(name)
        fresh.load_state_dict(torch.load(file, weights_only=True), strict=False)
        torch.testing.assert_close(fresh(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_ranks_and_scales_that_differ_are_carried_by_B(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    config = LoRAConfig(r=4, alpha=6.0, target_modules=["0", "1"], rank_pattern={"1": 2}, alpha_pattern={"0": 3.0})
    handle = lorakit.attach(model, config)
    randomise(handle)
    file = save_adapter(handle.extract(), tmp_path / "a.pt", format="loralib", context=Context(alpha=5.0))
    theirs = nn.Sequential(loralib.Linear(6, 8, r=4, lora_alpha=5), loralib.Linear(8, 6, r=2, lora_alpha=5))
    theirs.load_state_dict(torch.load(file, weights_only=True), strict=False)
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if "lorakit" not in k}, strict=False)
    x = torch.randn(3, 6)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    again = load_adapter(file, context=Context(base=BaseFacts.of(handle.detach()), alpha=5.0))
    lorakit.attach(model, again)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)


def test_transposed_layers_and_models_made_of_loralib_are_understood(gpt2, tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn = loralib.MergedLinear(
                32, 96, r=2, lora_alpha=4, enable_lora=[True, False, True], fan_in_fan_out=True
            )

    state = {}
    for layer in range(2):
        block = Block()
        nn.init.normal_(block.c_attn.lora_B)
        state |= {f"transformer.h.{layer}.attn.{k}": v for k, v in loralib.lora_state_dict(block).items()}
    torch.save(state, tmp_path / "a.pt")
    context = Context(base=BaseFacts.of(gpt2), alpha=4.0, enable_lora=(True, False, True))
    adapter = load_adapter(tmp_path / "a.pt", context=context)
    assert adapter.config.target_modules == ("c_attn",)
    assert adapter.config.r == 4
    merged = block.c_attn.merge_AB().detach() * block.c_attn.scaling  # (in, out), as the weight lies
    torch.testing.assert_close(adapter.delta("transformer.h.1.attn.c_attn").T, merged)
    theirs, _ = pair("convolution")
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "b.pt")
    assert list(load_adapter(tmp_path / "b.pt", context=context_of(theirs)).factors) == ["inner.layer.conv"]


# ---------------------------------------------------------------- what is missing, wrong or hostile


def test_what_the_file_does_not_say_must_be_given(tmp_path):
    theirs, model = pair("merged")
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "a.pt")
    with pytest.raises(AdapterFileError, match="give alpha"):
        Adapter.load(tmp_path / "a.pt", model=model)
    with pytest.raises(AdapterFileError, match="give the base model"):
        Adapter.load(tmp_path / "a.pt", alpha=6.0)
    with pytest.raises(AdapterFileError, match="2 of 3 parts, and the file does not say which: give enable_lora"):
        Adapter.load(tmp_path / "a.pt", model=model, alpha=6.0)
    with pytest.raises(AdapterFileError, match=r"enable_lora=\[True, False, False\] says otherwise"):
        load_adapter(
            tmp_path / "a.pt",
            context=Context(base=BaseFacts.of(model), alpha=6.0, enable_lora=(True, False, False)),
        )
    for alpha in (0.0, float("inf")):
        with pytest.raises(AdapterFileError, match="alpha must be a positive number"):
            Adapter.load(tmp_path / "a.pt", model=model, alpha=alpha)


def test_every_bad_tensor_is_listed_in_one_error(tmp_path):
    theirs, model = pair("linear")
    state = loralib.lora_state_dict(theirs)
    state["inner.layre.lora_A"] = torch.zeros(4, 12)
    state["inner.layer.weight"] = torch.zeros(20, 12)
    del state["inner.layer.lora_B"]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(tmp_path / "a.pt", model=model, alpha=6.0)
    text = str(caught.value)
    assert "inner.layre.lora_A: no such layer in the base; nearest: inner.layer" in text
    assert "inner.layer.weight: unexpected" in text
    assert "inner.layer: lora_B is missing" in text


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_that_fit_no_layer_are_refused(name, tmp_path):
    theirs, model = pair(name)
    state = loralib.lora_state_dict(theirs)
    key = "inner.layer.lora_B"
    narrower = state[key][:, :-1]  # of "merged all": a sound layer of four parts of rank 3
    for changed in (state[key][:-1], state[key][None], *([] if name == "merged all" else [narrower])):
        torch.save({**state, key: changed.clone()}, tmp_path / "a.pt")
        with pytest.raises(AdapterFileError, match=r"inner\.layer: "):
            load_adapter(tmp_path / "a.pt", context=context_of(model, name))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file was run')",))


def test_pickles_run_nothing(tmp_path):
    model, file = nn.Sequential(nn.Linear(3, 3)), tmp_path / "a.pt"
    contents = [pickle.dumps(Evil()), b"", b"PK\x03\x04 and then nothing", b"\x80\x04."]
    for content in contents:
        file.write_bytes(content)
        assert recognise(file) == "loralib"
        with pytest.raises(AdapterFileError, match=r"a\.pt"):
            Adapter.load(file, model=model, alpha=1.0)
    sound = {"0.lora_A": torch.zeros(1, 3), "0.lora_B": torch.zeros(3, 1)}
    others = [
        ([1, 2], "no dict"),
        ({0: torch.zeros(1)}, "no dict"),
        ({**sound, "x.lora_A": "text"}, "holds str, not a dense tensor"),
        ({**sound, "x.lora_A": torch.zeros(3, 3).to_sparse()}, "not a dense tensor"),
        ({**sound, "x.lora_A": torch.zeros(1).expand(10**6, 10**6)}, "is not in a file of"),
        ({**sound, "0.lora_A": torch.zeros(1, 3, dtype=torch.float8_e5m2)}, "zero in every layer"),
    ]
    for value, message in others:
        torch.save(value, file)
        with pytest.raises(AdapterFileError, match=message):
            Adapter.load(file, format="loralib", model=model, alpha=1.0)
    torch.save({**sound, "1.lora_A": torch.zeros(10**6)}, file)
    with zipfile.ZipFile(file) as small, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in small.infolist():
            bomb.writestr(entry.filename, small.read(entry))
    with pytest.raises(AdapterFileError, match="is compressed"):
        Adapter.load(tmp_path / "bomb.pt", model=model, alpha=1.0)
    torch.save({**sound, "evil": Evil()}, file)
    with pytest.raises(AdapterFileError, match="not a file of tensors"):
        Adapter.load(file, model=model, alpha=1.0)


def test_a_header_that_contradicts_the_caller_is_refused(tmp_path):
    _, model = pair("linear")
    handle = lorakit.attach(model, LoRAConfig(r=4, alpha=6.0, target_modules=["layer"]))
    randomise(handle)
    file = handle.extract().save(tmp_path, "loralib")
    assert file == tmp_path / "lora.safetensors"
    model = handle.detach()
    assert Adapter.load(file, model=model, alpha=6.0).config.alpha == 6.0
    with pytest.raises(AdapterFileError, match="alpha is 6 by its header, 7 as given"):
        Adapter.load(file, model=model, alpha=7.0)


def test_what_loralib_cannot_hold_is_an_obstacle_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped = nn.Conv2d(4, 4, 3, groups=2)
            self.oblong = nn.Conv2d(4, 4, (1, 3))
            self.line = nn.Conv1d(4, 4, 3)
            self.fine = nn.Conv2d(4, 4, 3)
            self.head = nn.Linear(4, 2)

    config = LoRAConfig(r=2, target_modules=["grouped", "oblong", "line", "fine"], modules_to_save=("head",))
    found = obstacles(lorakit.attach(Model(), config).extract(), "loralib")
    starts = [
        "head.weight: trained whole",
        "head.bias: trained whole",
        "grouped: a grouped",
        "oblong: a kernel of 1 x 3",
    ]
    assert [next((s for s in starts if p.startswith(s)), p) for p in found] == [
        *starts,
        "line: a 1-d convolution; loralib's work in 2-d only",
    ]
