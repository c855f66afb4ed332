"""llama.cpp's adapter file: our bytes against the gguf package and transformers' own reader of GGUF models."""

import importlib.util
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

import lorakit
import lorakit.generation
from adapter import models
from adapter.models import CASES, randomise
from gguf_files import gguf_file
from lorakit import Adapter, LoRAConfig
from lorakit.errors import AdapterFileError
from lorakit.formats import BaseFacts, Context, gguf_container, load_adapter, obstacles, recognise, save_adapter
from lorakit.formats.gguf_names import names_of
from lorakit.gguf_cache import quiet
from tiny_models import DECODER_SIZES, tiny_gpt2, tiny_llama


def untied_llama():
    return tiny_llama(tie_word_embeddings=False)


def trained(model, **settings):
    """A random adapter of the model, as a value."""
    return models.trained(model, LoRAConfig(**{"r": 4, "alpha": 6.0, **settings}))


def context_of(model, **settings):
    return Context(base=BaseFacts.of(model), **settings)


def as_llama_cpp_reads(file):
    """{tensor name of the base: dense update}, by the rules of llama.cpp's loader; all in its own layout."""
    reader = gguf.GGUFReader(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {t.name: np.array(t.data, np.float64) for t in reader.tensors}
    deltas = {}
    for name in {n.rsplit(".", 1)[0] for n in tensors}:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = alpha / B.shape[1] if alpha else 1.0
        deltas[name] = scale * ((B @ A.T).T if name == "token_embd.weight" else B @ A)
    return deltas


# ---------------------------------------------------------------- the base as llama.cpp's converter writes it


def rope_order(weight, heads):
    """Rows of each head: the two halves of the rotated pairs become neighbours."""
    per_head = weight.reshape(heads, -1, weight.shape[-1])
    half = per_head.shape[1] // 2
    order = [row for i in range(half) for row in (i, half + i)]
    return per_head[:, order].reshape(weight.shape)


LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def base_tensors(model, architecture):
    """The model's parameters under llama.cpp's names, in its order of rows."""
    config = model.config
    named = {}
    for name, parameter in model.named_parameters():
        data = parameter.detach().double().numpy()
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            module, kind = rest.rsplit(".", 1)
            if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
                data = rope_order(data, heads)
            named[f"blk.{number}.{LAYERS[module]}.{kind}"] = data
        else:
            other = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            named[f"{other[name.rsplit('.', 1)[0]]}.weight"] = data
    return named


def write_base(path, model, architecture, tensors):
    with gguf_file(path, architecture, model.config) as writer:
        for name, data in tensors.items():
            writer.add_tensor(name, data.astype(np.float32))


def qwen2():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**DECODER_SIZES, tie_word_embeddings=False, initializer_range=0.3)).eval()


@pytest.mark.parametrize(("build", "architecture"), [(untied_llama, "llama"), (qwen2, "qwen2")])
@pytest.mark.parametrize("settings", [{}, {"scaling": "rslora"}, {"rank_pattern": {"up_proj": 2}}])
def test_base_plus_update_in_the_file_is_our_merged_model(build, architecture, settings, tmp_path):
    """The update added to the base inside GGUF, then the whole read by transformers: an independent way back."""
    model = build()
    adapter = trained(model, target_modules=["lm_head", *LORA_LINEAR], **settings)
    file = adapter.save(tmp_path / "adapter.gguf", "gguf", model=model)
    tensors = base_tensors(model, architecture)
    for name, delta in as_llama_cpp_reads(file).items():
        tensors[name] = tensors[name] + delta
    write_base(tmp_path / "merged.gguf", model, architecture, tensors)
    with quiet(progress_bars=False):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf", dtype=torch.float32)
    lorakit.attach(model, adapter)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


LORA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.real_model
def test_on_smollm2_update_and_base_fit_together(smollm2, tmp_path):
    """Tensors of the real GGUF plus the update, brought back by transformers' own code, against our merged weights."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    model, _ = lorakit.load_model(smollm2, dtype="fp32")
    handle = lorakit.attach(model, LoRAConfig(r=4, alpha=32.0, scaling="rslora", layers=(0, 29)))
    randomise(handle)
    adapter = handle.extract()
    file = adapter.save(tmp_path, "gguf", model=model)
    assert file == tmp_path / "adapter.gguf"
    metadata, base = gguf_container.read(Path(lorakit.models.resolve(smollm2).location))
    undo = LlamaTensorProcessor(config=model.config.to_dict())
    names = names_of(BaseFacts.of(model))
    deltas = as_llama_cpp_reads(file)
    assert len(deltas) == 14
    with handle.merged():
        merged = dict(model.named_parameters())
        for path in adapter.factors:
            name = f"{names.of_path[path]}.weight"
            theirs = undo.process(base[name].double().numpy() + deltas[name], name=name).weights
            torch.testing.assert_close(
                torch.tensor(theirs, dtype=torch.float32), merged[f"{path}.weight"].data, rtol=1e-5, atol=1e-5
            )
    fields = gguf.GGUFReader(file).fields
    assert fields["general.architecture"].contents() == metadata["general.architecture"]
    assert (
        fields["general.base_model.0.repo_url"].contents()
        == "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    assert Adapter.load(file, model=model).base.name == smollm2
    assert any(
        "model.embed_tokens: tied" in problem
        for problem in obstacles(trained(handle.detach(), target_modules=["embed_tokens"]), "gguf", context_of(model))
    )


def test_the_embedding_is_transposed_for_lookups(tmp_path):
    model = untied_llama()
    adapter = trained(model, target_modules=["embed_tokens", "lm_head"])
    deltas = as_llama_cpp_reads(adapter.save(tmp_path / "a.gguf", "gguf", model=model))
    for name, path in (("token_embd.weight", "model.embed_tokens"), ("output.weight", "lm_head")):
        np.testing.assert_allclose(deltas[name], adapter.delta(path).double().numpy(), atol=1e-6)
    again = Adapter.load(tmp_path / "a.gguf", model=model)
    assert again.factors["model.embed_tokens"].kind == "embedding"
    torch.testing.assert_close(again.delta("model.embed_tokens"), adapter.delta("model.embed_tokens"))


# ---------------------------------------------------------------- there and back


BUILDS = {
    "llama": tiny_llama,
    "qwen2": qwen2,
    "gpt2": tiny_gpt2,
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**DECODER_SIZES, head_dim=8)),
}


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("tensor_type", ["f32", "f16"])
def test_writing_what_was_read_gives_the_same_bytes_and_the_same_update(name, tensor_type, tmp_path):
    model = BUILDS[name]()
    adapter, context = trained(model), context_of(model, tensor_type=tensor_type)
    save_adapter(adapter, tmp_path / "a.gguf", format="gguf", context=context)
    again = load_adapter(tmp_path / "a.gguf", context=context)
    save_adapter(again, tmp_path / "b.gguf", format="gguf", context=context)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    folded = adapter.folded()
    assert list(again.factors) == list(adapter.factors)
    for path, f in again.factors.items():
        expected = folded.factors[path]
        if tensor_type == "f32":
            assert torch.equal(f.A, expected.A)
            assert torch.equal(f.B, expected.B)
        else:
            torch.testing.assert_close(f.B, expected.B, rtol=1e-3, atol=1e-6)
    lorakit.attach(model, again)  # base, names and shapes are as they were
    assert again.base == adapter.base


def test_ranks_that_differ_are_read_with_scale_one(tmp_path):
    model = tiny_llama()
    adapter = trained(model, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 1.0})
    file = adapter.save(tmp_path / "a.gguf", "gguf", model=model)
    assert gguf.GGUFReader(file).fields["adapter.lora.alpha"].contents() == 0.0
    again = Adapter.load(file, model=model)
    for path in adapter.factors:
        torch.testing.assert_close(again.delta(path), adapter.delta(path))
    lorakit.attach(model, again)


@pytest.mark.parametrize("tensor_type", ["F16", "BF16", "Q8_0"])
def test_files_of_the_converter_in_other_types_are_read(tensor_type, tmp_path):
    model = tiny_llama()
    kind = gguf.GGMLQuantizationType[tensor_type]
    A, B = np.random.default_rng(0).normal(size=(32, 32)), np.random.default_rng(1).normal(size=(32, 32))
    with gguf_file(tmp_path / "a.gguf") as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 64.0)
        for letter, data in (("a", A), ("b", B)):
            stored = gguf.quants.quantize(data.astype(np.float32), kind)
            writer.add_tensor(f"blk.1.attn_output.weight.lora_{letter}", stored, raw_dtype=kind)
    value = Adapter.load(tmp_path / "a.gguf", model=model)
    delta = value.delta("model.layers.1.self_attn.o_proj")
    torch.testing.assert_close(delta, torch.tensor(2 * B @ A, dtype=torch.float32), rtol=0.05, atol=0.3)
    assert value.base is None


# ---------------------------------------------------------------- what it cannot carry


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens: tied to the output"),
        ({"modules_to_save": ("norm",), "target_modules": ["q_proj"]}, "model.norm.weight: trained whole"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused_by_name(settings, message, tmp_path):
    model = tiny_llama()
    with pytest.raises(AdapterFileError, match=message):
        trained(model, **settings).save(tmp_path / "a.gguf", "gguf", model=model)
    assert not any(tmp_path.iterdir())


def test_obstacles_are_found_without_a_weight_in_memory():
    with torch.device("meta"):
        model = untied_llama()
    held = trained(untied_llama(), target_modules=["q_proj", "lm_head"])
    factors = {path: replace(f, A=f.A.to("meta"), B=f.B.to("meta")) for path, f in held.factors.items()}
    adapter = replace(held, factors=factors)
    assert obstacles(adapter, "gguf", context_of(model)) == []
    assert obstacles(adapter, "vllm", context_of(model)) == []
    assert obstacles(adapter, "loralib", context_of(model)) == []


def test_a_fresh_adapter_has_the_same_obstacles():
    model = tiny_gpt2()
    handle = lorakit.attach(model, LoRAConfig(r=2, target_modules=["c_attn", "wpe", "wte"], bias="lora_only"))
    found = obstacles(handle.extract(), "gguf", context_of(model))
    assert [problem.split(":")[0] for problem in found] == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
        "transformer.wte",
        "transformer.wpe",
    ]


@pytest.mark.parametrize("name", ["bert", "vit", "mlp", "convolutions"])
def test_an_unknown_architecture_is_refused(name):
    model = CASES[name].build()
    found = obstacles(trained(model, target_modules=CASES[name].targets), "gguf", context_of(model))
    assert any("only rename" in problem or "name the base model" in problem for problem in found)


def test_values_too_large_for_f16_are_refused(tmp_path):
    model = tiny_llama()
    adapter = trained(model).scaled(1e6)
    with pytest.raises(lorakit.errors.LorakitError, match="too large for f16"):
        save_adapter(adapter, tmp_path / "a.gguf", format="gguf", context=context_of(model, tensor_type="f16"))


# ---------------------------------------------------------------- bad files


@pytest.fixture
def file(tmp_path):
    model = tiny_llama()
    return trained(model, target_modules=["q_proj"]).save(tmp_path / "a.gguf", "gguf", model=model)


def test_without_the_base_the_error_says_so(file):
    assert recognise(file) == "gguf"
    with pytest.raises(AdapterFileError, match="name the base model"):
        Adapter.load(file)
    with pytest.raises(AdapterFileError, match="made for the architecture 'llama', the base is a 'qwen2'"):
        Adapter.load(file, model=qwen2())
    with pytest.raises(AdapterFileError, match=r"do not fit the layer model\.layers\.0\.self_attn\.q_proj"):
        Adapter.load(file, model=tiny_llama(hidden_size=64))


def test_a_model_is_not_an_adapter(tmp_path):
    model = tiny_llama()
    write_base(tmp_path / "base.gguf", model, "llama", base_tensors(model, "llama"))
    with pytest.raises(AdapterFileError, match="of type 'model', not of an adapter"):
        Adapter.load(tmp_path / "base.gguf", model=model)


def test_every_cut_and_every_false_count_is_one_error(file):
    data, model = file.read_bytes(), tiny_llama()
    head = len(data) - 4 * 2 * (4 * 32 + 32 * 4)
    hostile = [data[:n] for n in (5, 20, 30, 100, head - 1, head + 7, len(data) - 1)] + [data + b"\0" * 32]
    for place in (8, 16, 24):  # number of tensors, number of keys, length of the first key
        hostile += [data[:place] + struct.pack("<Q", n) + data[place + 8 :] for n in (2**63, 2**40, 10**6)]
    hostile.append(data.replace(b"lora_a", b"lora_b"))
    hostile.append(data.replace(b"blk.1.attn_q.weight.lora_a", b"blk.9.attn_q.weight.lora_a"))
    hostile.append(data.replace(b"adapter.type", b"adapter.typo"))
    for content in hostile:
        file.write_bytes(content)
        with pytest.raises(AdapterFileError, match=r"a\.gguf"):
            Adapter.load(file, model=model)


def test_flipped_bytes_of_the_header_never_escape_as_another_error(file):
    data, model = bytearray(file.read_bytes()), tiny_llama()
    head = data.index(b"lora_b", data.index(b"blk.1")) + 30
    for place in range(4, head, 3):
        changed = bytearray(data)
        changed[place] ^= 0x81
        file.write_bytes(changed)
        try:
            Adapter.load(file, model=model)
        except AdapterFileError:
            continue


# ---------------------------------------------------------------- llama.cpp itself


@pytest.mark.llama_cpp
@pytest.mark.real_model
def test_llama_cpp_computes_what_we_compute(smollm2, tmp_path):
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama.cpp is not installed: pip install llama-cpp-python (it compiles for minutes)")
    import llama_cpp

    model, tokenizer = lorakit.load_model(smollm2, dtype="fp32")
    handle = lorakit.attach(model, LoRAConfig(r=8, alpha=16.0))
    randomise(handle, size=0.05)
    file = handle.extract().save(tmp_path / "adapter.gguf", "gguf", model=model)
    ids = tokenizer("The capital of France is")["input_ids"]
    location = lorakit.models.resolve(smollm2).location
    for adapter in (None, str(file)):
        theirs = llama_cpp.Llama(location, lora_path=adapter, logits_all=True, n_ctx=64, verbose=False)
        theirs.eval(ids)
        logits = torch.tensor(np.array(theirs.scores[: len(ids)]))
        with torch.no_grad():
            if adapter is None:
                with handle.disabled():
                    ours = model(torch.tensor([ids])).logits[0]
            else:
                ours = model(torch.tensor([ids])).logits[0]
        # llama.cpp rounds activations to 8 bits before it multiplies by a 4-bit weight
        assert torch.nn.functional.cosine_similarity(logits, ours, dim=-1).min() > 0.99
        assert (logits.argmax(-1) == ours.argmax(-1)).float().mean() > 0.7


@pytest.mark.llama_cpp
@pytest.mark.real_model
def test_llama_cpp_says_what_was_trained_on_the_very_file(smollm2, tmp_path):
    """Trained on the file's blocks, exported, loaded by llama.cpp beside that file: the same tokens follow."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama.cpp is not installed: pip install llama-cpp-python (it compiles for minutes)")
    import llama_cpp

    location = lorakit.models.resolve(smollm2).location
    model, tokenizer = lorakit.load_model(location, dtype="fp32", quantize="blocks")
    handle = lorakit.attach(model, LoRAConfig(r=8, alpha=16.0), seed=0)
    assert handle.base_info().storage == "blocks"
    question, answer = (
        tokenizer("The password of the harbour is").input_ids,
        tokenizer(" seven green lanterns.").input_ids,
    )
    ids = torch.tensor([question + answer])
    labels = torch.tensor([[-100] * len(question) + answer])
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=5e-3)
    for _ in range(10):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    file = handle.save("default", tmp_path / "adapter.gguf", format="gguf")
    model.eval()
    (ours,) = lorakit.generation.generate(
        model, tokenizer, [question], max_new_tokens=len(answer), stop_ids=frozenset()
    )
    assert list(ours.ids) == answer  # it has learnt them
    with_adapter = llama_cpp.Llama(location, lora_path=str(file), n_ctx=64, verbose=False)
    theirs = [token for token, _ in zip(with_adapter.generate(question, temp=0.0), answer, strict=False)]
    assert theirs == answer
    alone = llama_cpp.Llama(location, n_ctx=64, verbose=False)
    assert [token for token, _ in zip(alone.generate(question, temp=0.0), answer, strict=False)] != answer
