"""Attentions and experts in PEFT's files, both ways, against PEFT itself."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit
from adapter.models import CASES, EXPERTS, mixtral, qwen3_moe, randomise
from core.test_experts import gpt_oss
from formats.test_peft import change_config, change_tensors, quiet_peft
from lorakit import Adapter, LoRAConfig
from lorakit.errors import AdapterFileError
from lorakit.files import read_safetensors_header
from lorakit.formats.peft import CONFIG_FILE, TENSOR_FILE

WHAT = {
    "attention": ("attention", {"target_modules": ["first", "cross"]}),
    "attention and a layer": ("attention, sequence first", {"target_modules": ["cross", "out"]}),
    "torch encoder": ("torch encoder", {"target_modules": ["self_attn", "linear1"]}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": list(EXPERTS)}),
    "mixtral, experts alone": ("mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "qwen3": ("qwen3 moe", {"target_modules": ["v_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}),
}  # fmt: skip
PATTERNS = {
    "attention": {"rank_pattern": {"cross": 2}, "alpha_pattern": {"first": 3.0}},
    "mixtral": {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 3.0}},
}


def test_stacks_that_lie_the_other_way_round(tmp_path):
    """gpt-oss keeps (experts, in, out); PEFT's A and B mean in and out all the same."""
    torch.manual_seed(0)
    model, ids = gpt_oss().eval(), torch.arange(20).view(2, 10)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=list(EXPERTS))
    wrapped = quiet_peft(peft.get_peft_model, model, config).eval()
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora_" in n:
                p.normal_(0, 0.2)
        expected = wrapped(ids).logits
    quiet_peft(wrapped.save_pretrained, tmp_path / "a")
    plain = quiet_peft(wrapped.unload)
    handle = lorakit.attach(plain, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-5)
        handle.save("default", tmp_path / "b")
        again = quiet_peft(peft.PeftModel.from_pretrained, handle.detach(), tmp_path / "b").eval()
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["loralib", "vllm", "gguf", "ollama", "kohya", "diffusers"])
@pytest.mark.parametrize("name", ["attention", "qwen3 moe"])
def test_formats_without_attentions_or_experts_say_so_by_path(format, name, tmp_path):
    case = CASES[name]
    model = case.build()
    handle = lorakit.attach(model, LoRAConfig(r=2, **case.what))
    randomise(handle)
    with pytest.raises(AdapterFileError) as caught:
        handle.extract().save(tmp_path / "a", format, model=model)
    word = "MultiheadAttention" if name == "attention" else "experts"
    assert any(path in str(caught.value) for path in handle.extract().factors)
    assert word in str(caught.value)
    assert not (tmp_path / "a").exists()


@pytest.fixture(autouse=True)
def no_fast_path():
    """torch's encoder passes PEFT's layers by where nothing requires a gradient."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def run(case, model):
    with torch.no_grad():
        return case.run(model)


def test_an_adapted_router_is_read(tmp_path):
    """PEFT's "all-linear" on a mixture means what was linear in transformers 4: the router and all experts too."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model, ids = qwen3_moe().eval(), torch.arange(8).view(2, 4)
    wrapped = quiet_peft(peft.get_peft_model, copy.deepcopy(model), config).eval()
    quiet_peft(wrapped.save_pretrained, tmp_path / "a")
    lorakit.attach(model, tmp_path / "a")
    torch.testing.assert_close(model(ids).logits, wrapped(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("what", WHAT)
def test_we_read_peft_files_and_compute_what_peft_computes(what, rslora, tmp_path):
    name, targets = WHAT[what]
    case = CASES[name]
    settings = {**targets, **PATTERNS.get(what, {})}
    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, **settings)
    wrapped = quiet_peft(peft.get_peft_model, case.build(), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora_" in n:
                p.add_(torch.randn_like(p) * 0.2)
    expected = run(case, wrapped.eval())
    quiet_peft(wrapped.save_pretrained, tmp_path / "a")
    model = case.build()
    handle = lorakit.attach(model, tmp_path / "a")
    torch.testing.assert_close(run(case, model), expected, rtol=1e-4, atol=1e-5)
    handle.save("default", tmp_path / "b")
    again = quiet_peft(peft.PeftModel.from_pretrained, handle.detach(), tmp_path / "b").eval()
    torch.testing.assert_close(run(case, again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in ("attention", "attention, sequence first", "torch encoder", "mixtral", "qwen3 moe")),
        ("attention", PATTERNS["attention"]),
        ("mixtral", PATTERNS["mixtral"]),
        ("attention", {"exclude_modules": ("first",)}),
        ("attention", {"exclude_modules": ("first.out_proj",)}),
        ("attention", {"exclude_modules": r"first"}),
        ("torch encoder", {"layers": (1,)}),
        ("torch encoder", {"bias": "all"}),
        ("mixtral", {"layers": (1,), "dropout": 0.1}),
        ("mixtral", {"exclude_modules": ("experts.down_proj",)}),
        ("mixtral", {"exclude_modules": ("layers.0.mlp.experts.down_proj", "q_proj")}),
        ("qwen3 moe", {"init": "orthogonal"}),
    ],
)
def test_peft_reads_our_files_and_computes_what_we_compute(name, changes, scaling, tmp_path):
    case = CASES[name]
    model = case.build()
    handle = lorakit.attach(model, LoRAConfig(**{"r": 4, "alpha": 8.0, "scaling": scaling, **case.what, **changes}))
    randomise(handle)
    ours, value = run(case, model), handle.extract()
    handle.save("default", tmp_path / "a")
    handle.detach()
    assert Adapter.load(tmp_path / "a").digest() == value.digest()
    assert Adapter.load(tmp_path / "a").config == value.config
    lorakit.attach(model, tmp_path / "a")
    assert torch.equal(run(case, model), ours)
    lorakit.adapters(model).detach()
    theirs = quiet_peft(peft.PeftModel.from_pretrained, model, tmp_path / "a").eval()
    torch.testing.assert_close(run(case, theirs), ours, rtol=1e-4, atol=1e-5)


def test_names_and_shapes_are_pefts(tmp_path):
    handle = lorakit.attach(mixtral(), LoRAConfig(r=2, target_modules=(), target_parameters=EXPERTS))
    handle.save("default", tmp_path / "a")
    tensors, _ = read_safetensors_header(tmp_path / "a" / TENSOR_FILE)
    prefix = "base_model.model.model.layers.0.mlp.experts"
    assert {key.removeprefix(prefix): shape for key, (_, shape) in tensors.items() if key.startswith(prefix)} == {
        ".base_layer.lora_A.weight": (8, 32),  # gate_up_proj: 4 experts of rank 2
        ".base_layer.lora_B.weight": (96, 8),
        ".lora_A.weight": (8, 48),  # down_proj
        ".lora_B.weight": (32, 8),
    }


def test_a_setting_that_somebody_changed_counts(tmp_path):
    """What PEFT cannot hold is in our metadata, until PEFT's own value is another."""
    handle = lorakit.attach(mixtral(), LoRAConfig(r=2, dropout=0.1, target_parameters=EXPERTS))
    randomise(handle)
    handle.save("default", tmp_path / "a")
    assert json.loads((tmp_path / "a" / CONFIG_FILE).read_text())["lora_dropout"] == 0.0
    assert Adapter.load(tmp_path / "a").config.dropout == 0.1
    change_config(tmp_path / "a", lora_dropout=0.3)
    assert Adapter.load(tmp_path / "a").config.dropout == 0.3


def test_ranks_and_scales_that_differ_within_an_attention_are_evened_out(tmp_path):
    """PEFT has one of each for both projections."""
    case = CASES["attention"]
    model = case.build()
    config = LoRAConfig(r=4, rank_pattern={"first.out_proj": 2, "cross": 3}, alpha_pattern={"out_proj": 5.0})
    handle = lorakit.attach(model, config)
    randomise(handle)
    assert {path: f.r for path, f in handle.extract().factors.items()} == {
        "first": 4,
        "first.out_proj": 2,
        "cross": 3,
        "cross.out_proj": 3,
        "out": 4,
    }
    ours = run(case, model)
    handle.save("default", tmp_path / "a")
    theirs = quiet_peft(peft.PeftModel.from_pretrained, handle.detach(), tmp_path / "a").eval()
    torch.testing.assert_close(run(case, theirs), ours, rtol=1e-4, atol=1e-5)
    model = case.build()
    lorakit.attach(model, tmp_path / "a").save("default", tmp_path / "b")
    torch.testing.assert_close(run(case, model), ours, rtol=1e-5, atol=1e-5)
    for file in (CONFIG_FILE, TENSOR_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, k: t.update({k: t[k][:-1]}), r"no stacks of rank 2"),
        (lambda t, k: t.update({k.replace("lora_A", "base_layer.lora_A"): t.pop(k)}), r"lora_[AB] is missing"),
        (lambda t, k: [t.pop(n) for n in list(t) if ".base_layer." in n], r"cannot tell which factors belong to which"),
        (lambda t, k: t.update({n.replace("mlp.experts", "mlp.other"): t.pop(n) for n in list(t)}), r"unexpected"),
    ],
)
def test_damaged_stacks_are_told(change, message, tmp_path):
    handle = lorakit.attach(qwen3_moe(), LoRAConfig(r=2, target_modules=(), target_parameters=EXPERTS))
    randomise(handle)
    handle.save("default", tmp_path / "a")
    key = "base_model.model.model.layers.1.mlp.experts.lora_A.weight"
    change_tensors(tmp_path / "a", lambda tensors: change(tensors, key))
    with pytest.raises(AdapterFileError, match=message):
        Adapter.load(tmp_path / "a")


def test_parameters_of_linear_layers_are_read(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["0.weight"])
    wrapped = quiet_peft(peft.get_peft_model, nn.Sequential(nn.Linear(6, 6)), config)
    nn.init.normal_(wrapped.base_model.model[0].lora_B["default"].weight)
    quiet_peft(wrapped.save_pretrained, tmp_path / "a")
    base = wrapped.base_model.model[0].base_layer
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(3, 6)
    model[0].load_state_dict(base.state_dict())
    handle = lorakit.attach(model, tmp_path / "a", check_base=False)
    torch.testing.assert_close(model(x), wrapped(x))
    handle.save("default", tmp_path / "b")
    assert (
        load_file(tmp_path / "b" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    )


def test_parameters_whose_order_no_file_tells_are_not_written(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))

        def forward(self, x):
            return x @ self.first @ self.second

    config = LoRAConfig(r=2, target_modules=(), target_parameters=("0.first", "0.second"), init="random")
    handle = lorakit.attach(nn.Sequential(Two()), config)
    with pytest.raises(AdapterFileError, match="0: factors of several of its parameters"):
        handle.save("default", tmp_path / "a")
