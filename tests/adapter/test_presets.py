"""Presets of target_modules: what each means in models of every kind, and that files do not need the words."""

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, OPTConfig, Qwen2MoeConfig

import lorakit
from adapter.models import CASES, randomise
from lorakit import Adapter, LoRAConfig
from lorakit.adapter.blank import blank_adapter
from lorakit.adapter.naming import exactly, names_alone, names_meaning
from lorakit.adapter.presets import members
from lorakit.adapter.targets import find_targets
from lorakit.core.layer import base_modules
from lorakit.errors import ConfigError, TargetError
from tiny_models import DECODER_SIZES, tiny_llama


class Experts(nn.Module):
    """A mixture whose experts are modules, with a network that all tokens share, as models' own code has them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(FeedForward(width, 12) for _ in range(4))
        self.shared = FeedForward(width, 20)
        self.shared_gate = nn.Linear(width, 1)


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(width, inner), nn.Linear(inner, width), nn.Linear(width, inner)


class Mixer(nn.Module):
    """A state space: projections to and fro around a convolution and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3, groups=16)
        self.inside, self.outside = nn.Linear(8, 32), nn.Linear(16, 8)


class Mixed(nn.Module):
    """A block of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Experts(), Mixer()])


def from_config(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def falcon():
    return from_config(FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=97))


def opt():  # feed-forward layers in the block itself
    sizes = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "vocab_size": 97}
    return from_config(OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))


def qwen2_moe():
    sizes = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    return from_config(Qwen2MoeConfig(**DECODER_SIZES, **sizes))


def case(name):
    return CASES[name].make


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
STACKS = ("experts.gate_up_proj", "experts.down_proj")
MEANT = [
    (case("llama"), "attention", QKVO, 8),
    (case("llama"), "mlp", GATED, 6),
    (case("llama"), "embeddings", ("embed_tokens", "lm_head"), 2),
    (case("gpt2"), "attention", ("c_attn", "attn.c_proj"), 4),
    (case("gpt2"), "mlp", ("c_fc", "mlp.c_proj"), 4),
    (case("gpt2"), "embeddings", ("wte", "lm_head"), 2),
    (case("bert"), "attention", ("query", "key", "value", "attention.output.dense"), 8),
    (case("bert"), "mlp", ("intermediate.dense", "layer.0.output.dense", "layer.1.output.dense"), 4),
    (case("bert"), "embeddings", ("word_embeddings",), 1),
    (case("vit"), "attention", QKVO, 8),
    (case("vit"), "mlp", ("fc1", "fc2"), 4),
    (case("vit"), "convolutions", ("projection",), 1),
    (case("torch encoder"), "attention", ("self_attn",), 4),
    (case("torch encoder"), "mlp", ("linear1", "linear2"), 4),
    (case("attention"), "attention", ("first", "cross"), 4),
    (case("convolutions"), "convolutions", ("one", "two", "circular", "same", "three"), 5),
    (case("embedding"), "embeddings", ("table",), 1),
    (case("mixtral"), "attention", QKVO, 8),
    (falcon, "attention", ("query_key_value", "dense"), 4),
    (falcon, "mlp", ("dense_h_to_4h", "dense_4h_to_h"), 4),
    (opt, "attention", ("k_proj", "v_proj", "q_proj", "out_proj"), 8),
    (opt, "mlp", ("fc1", "fc2"), 4),
    (qwen2_moe, "mlp", GATED, 6),  # the shared expert; not its gate, nor the router
    (Mixed, "mlp", ("shared.w1", "shared.w2", "shared.w3"), 3),
    (Mixed, "all-linear", "all-linear", 19),
]


@pytest.mark.parametrize(("make", "word", "names", "layers"), MEANT)
def test_means_layers_by_what_they_are(make, word, names, layers):
    targets = find_targets(make(), LoRAConfig(r=4, target_modules=word))
    assert len(targets.layers) == layers
    assert targets.config.target_modules == names
    assert targets.config.target_parameters == ()


@pytest.mark.parametrize("make", [case("mixtral"), case("qwen3 moe"), qwen2_moe])
def test_experts_that_are_stacked_are_parameters(make):
    targets = find_targets(make(), LoRAConfig(r=4, target_modules="experts"))
    assert len(targets.layers) == 4
    assert targets.config.target_modules == ()
    assert targets.config.target_parameters == STACKS


def test_experts_that_are_modules_are_layers():
    found = {target.path for target in find_targets(Mixed(), LoRAConfig(r=4, target_modules="experts")).layers}
    assert found == {f"layers.0.experts.{i}.{name}" for i in range(4) for name in ("w1", "w2", "w3")}


def test_presets_and_names_go_together():
    config = LoRAConfig(r=4, target_modules=("attention", "embeddings", "mlp.down_proj"), layers=None)
    found = find_targets(CASES["llama"].build(), config)
    assert len(found.layers) == 8 + 2 + 2
    assert set(found.config.target_modules) == {*QKVO, "embed_tokens", "lm_head", "down_proj"}
    moe = find_targets(
        CASES["mixtral"].build(),
        LoRAConfig(r=4, target_modules=("attention", "experts"), exclude_modules=("k_proj",), layers=(1,)),
    )
    assert [t.path.removeprefix("model.layers.1.") for t in moe.layers] == [
        *(f"self_attn.{name}" for name in ("q_proj", "v_proj", "o_proj")),
        *(f"mlp.{name}" for name in STACKS),
    ]
    assert moe.config.exclude_modules == ("k_proj",)


def test_all_linear_stays_the_word_that_other_libraries_know():
    assert LoRAConfig(target_modules=("all-linear",)) == LoRAConfig()
    assert find_targets(CASES["llama"].build(), LoRAConfig()).config.target_modules == "all-linear"
    both = find_targets(CASES["llama"].build(), LoRAConfig(target_modules=("all-linear", "embeddings"))).config
    assert set(both.target_modules) == {*QKVO, *GATED, "embed_tokens", "lm_head"}


def test_one_that_means_nothing_is_refused_with_those_that_do():
    expected = r"'convolutions': LlamaForCausalLM has none of that; presets that mean something in it: "
    expected += r"all-linear \(14\), attention \(8\), mlp \(6\), embeddings \(2\)"
    with pytest.raises(TargetError, match=expected):
        find_targets(CASES["llama"].build(), LoRAConfig(target_modules=("attention", "convolutions")))
    with pytest.raises(TargetError, match="name its modules instead"):
        find_targets(nn.Sequential(nn.ReLU()), LoRAConfig())
    with pytest.raises(ConfigError, match="name layers or presets"):
        LoRAConfig(target_modules=())


def test_means_the_same_where_adapters_are_in_already_and_on_the_meta_device():
    model = CASES["mixtral"].build()
    handle = lorakit.attach(model, LoRAConfig(r=4, target_modules=("attention", "experts")))
    handle.add("more", LoRAConfig(r=2, target_modules=("attention", "experts", "embeddings")))
    assert len(handle.extract("more").factors) == 8 + 4 + 2
    with torch.device("meta"):
        skeleton = CASES["mixtral"].make()
    blank = blank_adapter(skeleton, LoRAConfig(r=4, target_modules=("attention", "experts")))
    assert blank.config == handle.extract("default").config


# PEFT's own call of a property that transformers has renamed; and adapters of tied layers are meant
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama", ("attention", "embeddings")),
        ("gpt2", ("mlp",)),
        ("gpt2", ("attention",)),
        ("bert", ("attention", "mlp")),
        ("mixtral", ("attention", "experts")),
        ("attention", ("attention",)),
        ("vit", ("convolutions", "mlp")),
    ],
)
def test_files_hold_names_that_peft_reads(name, words, tmp_path):
    model = CASES[name].build()
    handle = lorakit.attach(model, LoRAConfig(r=4, target_modules=words))
    randomise(handle)
    expected = CASES[name].run(model)
    handle.save("default", tmp_path)
    again = Adapter.load(tmp_path)
    assert again.config.target_modules not in (words, words[0])
    assert lorakit.attach(CASES[name].build(), again).extract().digest() == handle.extract().digest()
    peft = PeftModel.from_pretrained(CASES[name].build(), tmp_path).eval()
    torch.testing.assert_close(CASES[name].run(peft), expected, rtol=1e-4, atol=1e-4)


def test_a_module_called_like_a_preset_is_told_apart_in_files():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.other = nn.Linear(4, 4), nn.ModuleDict({"attention": nn.Linear(4, 4)})

    assert [t.path for t in find_targets(Named(), LoRAConfig(target_modules=names_alone(("mlp",)))).layers] == ["mlp"]
    assert [t.path for t in find_targets(Named(), LoRAConfig(target_modules=exactly(["mlp"]))).layers] == ["mlp"]
    both = LoRAConfig(target_modules=names_alone(("attention", "mlp")))
    assert [t.path for t in find_targets(Named(), both).layers] == ["mlp", "other.attention"]
    assert names_alone("all-linear") == "all-linear"
    assert names_meaning(["a.mlp"], ["a.mlp"]) == r"(.*\.)?(mlp)"


def test_names_are_the_shortest_that_nothing_else_has():
    known = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.0", "h.0.ln"]
    assert names_meaning(["h.0.attn.c_proj", "h.0.mlp.0"], known) == ("attn.c_proj", "mlp.0")
    assert names_meaning(["h.0.attn.c_proj"], None) == ("h.0.attn.c_proj",)
    assert names_meaning(["a.b"], ["a.b", "x.a.b"]) == r"a\.b"


def test_falcons_linear_is_one():
    with torch.device("cpu"):
        config = FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=97, bias=True)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(7)[None]
    base = model(ids).logits
    handle = lorakit.attach(model, LoRAConfig(r=4))
    torch.testing.assert_close(model(ids).logits, base)
    randomise(handle)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, base, atol=1e-3)
    with handle.merged():
        torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-4)


def test_what_adapters_hold_chooses_no_expert():
    model = tiny_llama()
    before = members(model, dict(base_modules(model)))
    layers = len(model.model.layers)
    lorakit.attach(model, LoRAConfig(r=layers, target_modules="embeddings"))  # A has as many rows as there are layers
    assert members(model, dict(base_modules(model))) == before


def test_a_misspelled_preset_is_told_the_nearest():
    with pytest.raises(TargetError, match="'embedings': matches no module; did you mean embeddings"):
        find_targets(tiny_llama(), LoRAConfig(target_modules=("embedings",)))
