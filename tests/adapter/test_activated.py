"""Activated LoRA: from its invocation on, and the base before; against PEFT, packed, cached, routed, recomputed."""

import copy
import pickle

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, T5Config, T5ForConditionalGeneration

import lorakit
from adapter.models import randomise
from lorakit import Adapter, LoRAConfig, PromptConfig, generate
from lorakit.adapter.in_use import invocations_of
from lorakit.adapter.invocations import last_start
from lorakit.core.cross_entropy import cross_entropy_sum
from lorakit.data.batches import collate
from lorakit.data.chat import Example
from lorakit.data.sources import Origin
from lorakit.errors import AdapterError, AdapterFileError, ConfigError, TargetError
from lorakit.packing import packed_logits
from lorakit.training.loop import ready
from lorakit.training.recomputing import checkpoint_activations
from tiny_models import DECODER_SIZES, tiny_gpt2, tiny_llama

INVOKE = (7, 8)
ROWS = torch.tensor(
    [
        [1, 2, 7, 8, 3, 4, 5, 6, 9],  # once
        [7, 8, 1, 2, 3, 7, 8, 4, 5],  # twice: the last counts
        [1, 2, 3, 4, 5, 6, 7, 9, 8],  # never
        [1, 1, 2, 3, 4, 5, 6, 7, 8],  # at the very end
    ]
)
STARTS = [2, 5, None, 7]

# PEFT's own call of a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def config(**changes):
    return LoRAConfig(**{"r": 4, "alpha": 8.0, "alora_invocation_tokens": INVOKE, **changes})


def activated(model=None, **changes):
    model = tiny_llama() if model is None else model
    handle = lorakit.attach(model, config(**changes))
    randomise(handle, size=0.1)
    return model, handle


@torch.no_grad()
def logits(model, ids=ROWS, **more):
    return model(input_ids=ids, **more).logits


def gradients(handle, name="default"):
    return {key: tensor.grad.clone() for key, tensor in handle.trainable_tensors(name).items()}


def test_finds_the_last_occurrence():
    assert last_start(ROWS, INVOKE).tolist() == [2, 5, -1, 7]
    assert last_start(ROWS[:, :1], INVOKE).tolist() == [-1] * 4


def test_counts_from_the_invocation_on_and_the_base_before():
    model, handle = activated()
    found = logits(model)
    with handle.disabled():
        base = logits(model)
    handle.add("everywhere", Adapter(**{**vars(handle.extract()), "config": config(alora_invocation_tokens=())}))
    handle.activate("everywhere")
    assert not torch.allclose(logits(model)[0, :2], base[0, :2], atol=1e-2)
    for row, start in enumerate(STARTS):
        before = found.shape[1] if start is None else start
        torch.testing.assert_close(found[row, :before], base[row, :before])
        if start is not None:
            assert not torch.allclose(found[row, start:], base[row, start:], atol=1e-2)


# ---------------------------------------------------------------- PEFT


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 4 LoRA tensor")  # PEFT takes biases of B for broken factors
@pytest.mark.parametrize(
    ("make", "changes"),
    [(tiny_llama, {}), (tiny_gpt2, {}), (tiny_gpt2, {"lora_bias": True, "target_modules": "attention"})],
)
def test_is_pefts_in_outputs_gradients_and_files(make, changes, tmp_path):
    model, handle = activated(make(), **changes)
    handle.save("default", tmp_path / "ours")
    theirs = PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True).eval()
    assert theirs.peft_config["default"].alora_invocation_tokens == list(INVOKE)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(input_ids=ROWS).logits, rtol=1e-4, atol=1e-4)
    weight = torch.linspace(0.1, 1, ROWS.numel()).view(*ROWS.shape, 1)
    for each in (model, theirs):
        (each(input_ids=ROWS).logits * weight).square().mean().backward()
    ours = gradients(handle)
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "B.bias": "lora_B.default.bias"}
    for name, gradient in ours.items():
        path, key = next((name.removesuffix(f".{k}"), k) for k in ("B.bias", "A", "B") if name.endswith(f".{k}"))
        expected = theirs.get_parameter(f"base_model.model.{path}.{names[key]}").grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert Adapter.load(tmp_path / "theirs").config.alora_invocation_tokens == INVOKE
    again = make()
    lorakit.attach(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_pefts_names():
    from lorakit.compat import peft

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    settings |= {"alora_invocation_tokens": list(INVOKE), "task_type": "CAUSAL_LM"}
    theirs = get_peft_model(tiny_llama(), LoraConfig(**settings)).eval()
    ours = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**settings)).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ROWS).logits, theirs(input_ids=ROWS).logits, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- training


def examples():
    beginning = list(range(20, 32))
    rows = [
        [*beginning, 7, 8, 40, 41, 42],
        [*beginning, 7, 8, 40, 50],
        [*beginning, 7, 8, 40, 41, 43, 7, 8, 44],  # invoked again: what it shares with the first counts otherwise
        [*beginning, 60, 61],  # never
        [90, 91, 7, 8, 92, 93, 94],
    ]
    return [Example(row, [False] * 6 + [True] * (len(row) - 6), Origin("rows", i)) for i, row in enumerate(rows)]


def loss_of(model, batch):
    return cross_entropy_sum(packed_logits(model, batch), batch.targets)


def packed(model, handle, *, share, train=True):
    rows = examples()
    model.train(train)
    with ready(model, 30) as may_share:
        assert may_share
        batch = collate(rows, range(len(rows)), share=share, invocations=invocations_of(model))
        loss = loss_of(model, batch)
        loss.backward()
    model.eval()
    found = gradients(handle)
    model.zero_grad()
    return loss.detach(), found, batch


def alone(model, handle, total=None):
    for row in examples():
        targets = torch.tensor(row.ids)[torch.tensor(row.trained)]
        places = torch.tensor(row.trained).nonzero().flatten() - 1
        loss = cross_entropy_sum(model(input_ids=torch.tensor([row.ids[:-1]])).logits[0, places], targets)
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    found = gradients(handle)
    model.zero_grad()
    return total, found


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("changes", [{}, {"init": "pissa"}, {"target_modules": ("v_proj", "down_proj")}], ids=str)
def test_packed_rows_are_the_rows_alone(share, changes):
    model, handle = activated(**changes)
    loss, found, batch = packed(model, handle, share=share)
    assert any(batch.forks) == share
    expected, alone_found = alone(model, handle)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, alone_found[name], rtol=1e-3, atol=1e-4)


def test_rows_share_no_token_that_the_adapter_is_for_in_one_of_them_alone():
    model, handle = activated()
    rows = examples()
    shared = collate(rows, range(5), share=True, invocations=invocations_of(model))
    careless = collate(rows, range(5), share=True)
    assert sum(shared.forks) < sum(careless.forks)
    with ready(model, 30), pytest.raises(AdapterError, match="collated with invocations=invocations_of"):
        packed_logits(model, careless)
    handle.detach()
    assert invocations_of(model) == ()


def test_recomputing_knows_which_tokens_it_was_for():
    model, handle = activated()
    _, expected, _ = packed(model, handle, share=True)
    checkpoint_activations(model, on=True)
    _, found, _ = packed(model, handle, share=True)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    model.train()
    first = model(input_ids=ROWS[:1]).logits.square().mean()
    second = model(input_ids=ROWS[1:]).logits.square().mean()  # another pass before the first one's backward
    (first + second).backward()
    with_both = gradients(handle)
    checkpoint_activations(model, on=False)
    model.zero_grad()
    (model(input_ids=ROWS[:1]).logits.square().mean() + model(input_ids=ROWS[1:]).logits.square().mean()).backward()
    for name, gradient in gradients(handle).items():
        torch.testing.assert_close(with_both[name], gradient, rtol=1e-4, atol=1e-6)


def test_recomputing_without_that_is_refused():
    model, _ = activated()
    model.activation_checkpointing_enable({"use_reentrant": False})
    loss = model.train()(input_ids=ROWS).logits.sum()
    with pytest.raises(AdapterError, match=r"'context_fn': lorakit\.core\.activated\.checkpoint_contexts"):
        loss.backward()


# ---------------------------------------------------------------- decoding


def slowly(handle, prompt, count):
    """Greedy decoding without keys and values: everything anew for each token, active from where the prompt says."""
    start = last_start(torch.tensor([prompt]), INVOKE)[0].item()
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(_logits_from(handle, ids, start)[-1].argmax()))
    return ids[len(prompt) :]


def _logits_from(handle, ids, start):
    """Logits of a plain LoRA whose layers are told by a hook which tokens count: another way to the same."""
    plain = tiny_llama()
    value = handle.extract()
    attached = lorakit.attach(plain, Adapter(**{**vars(value), "config": config(alora_invocation_tokens=())}))
    for module in attached.adapted_modules().values():

        def masked(own, args, y):
            from_there = torch.zeros(y.shape[1], 1)
            from_there[start if start >= 0 else len(from_there) :] = 1
            return torch.lerp(nn.functional.linear(args[0], own.weight), y, from_there.expand_as(y))

        module.register_forward_hook(masked)
    with torch.no_grad():
        return plain(input_ids=torch.tensor([ids])).logits[0]


class NoText:
    eos_token_id = None
    chat_template = None

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


PROMPTS = [[1, 2, 7, 8, 3], [7, 8, 1, 2, 3, 7, 8], [1, 2, 3, 4, 5, 6], [9, 9, 7, 8, 1, 2, 3, 4, 5, 5]]


def test_decoding_in_a_batch_with_keys_and_values_is_decoding_alone_without():
    model, handle = activated()
    found = generate(model, NoText(), PROMPTS, max_new_tokens=20, stop_ids=frozenset())
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert list(completion.ids) == slowly(handle, prompt, 20)
    with handle.disabled():
        base = generate(model, NoText(), PROMPTS, max_new_tokens=20, stop_ids=frozenset())
    assert [a.ids == b.ids for a, b in zip(found, base, strict=True)] == [False, False, True, False]


def test_transformers_own_decoding_keeps_count():
    model, handle = activated()
    prompt = PROMPTS[3]
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert ids[0, len(prompt) :].tolist() == slowly(handle, prompt, 12)


def test_keys_and_values_of_the_base_serve_what_comes_before_the_invocation():
    model, handle = activated()
    expected = logits(model)
    rows, at = slice(0, 1), 2
    with handle.disabled(), torch.no_grad():
        cache = model(input_ids=ROWS[rows, :at], use_cache=True).past_key_values
    theirs = copy.deepcopy(cache)
    found = logits(model, ROWS[rows, at:], past_key_values=cache)
    torch.testing.assert_close(found, expected[rows, at:], rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # by place, and a tuple back
        first, _ = model(ROWS[rows, at : at + 3], None, None, theirs, return_dict=False)
    rest = logits(model, ROWS[rows, at + 3 :], past_key_values=copy.deepcopy(theirs))
    torch.testing.assert_close(torch.cat([first, rest], 1), expected[rows, at:], rtol=1e-4, atol=1e-4)


def test_strange_keys_and_values_are_refused_where_it_matters():
    model, _handle = activated()
    with torch.no_grad():
        cache = tiny_llama()(input_ids=ROWS[:1, :2], use_cache=True).past_key_values
    with pytest.raises(AdapterError, match="whether an activated adapter was invoked in what they are of is not known"):
        logits(model, torch.tensor([[3]]), past_key_values=cache)
    logits(model, torch.tensor([[7, 8, 3]]), past_key_values=cache)
    with pytest.raises(AdapterError, match="keys and values are of 1 rows, the pass has 2"):
        logits(model, torch.tensor([[3], [4]]), past_key_values=cache)


# ---------------------------------------------------------------- beside others


def test_each_row_by_its_own_adapter():
    model, handle = activated()
    handle.add("plain", config(alora_invocation_tokens=(), target_modules="attention"))
    handle.add("other", config(alora_invocation_tokens=(1, 2)))
    randomise(handle, "plain", 0.1)
    randomise(handle, "other", 0.1)
    names = ["default", "other", "plain", None]
    expected = []
    for row, name in enumerate(names):
        handle.activate(name)
        expected.append(logits(model, ROWS[row : row + 1]))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        with handle.route([names[i] for i in order]):
            found = logits(model, ROWS[order])
            torch.testing.assert_close(found, torch.cat([expected[i] for i in order]), rtol=1e-4, atol=1e-4)
    prompts = [ROWS[i, :5].tolist() for i in range(4)]
    with handle.route(names):
        together = model.generate(ROWS[:, :5], max_new_tokens=8, do_sample=False, pad_token_id=0)
    for row, name in enumerate(names):
        handle.activate(name)
        (one,) = generate(model, NoText(), [prompts[row]], max_new_tokens=8, stop_ids=frozenset())
        assert together[row, 5:].tolist() == list(one.ids)


def test_several_add_up_each_where_it_counts():
    model, handle = activated(target_modules=("q_proj",))
    handle.add("other", config(alora_invocation_tokens=(3,), target_modules=("q_proj", "k_proj")))
    randomise(handle, "other", 0.1)
    handle.activate({"default": 0.5, "other": 2.0})
    x = torch.randn(4, 9, 32)
    layer = model.model.layers[0].self_attn.q_proj
    inside = []
    hook = layer.register_forward_hook(lambda module, args, y: inside.append((args[0], y)))
    logits(model)
    hook.remove()
    x, y = inside[0]
    expected = nn.functional.linear(x, layer.weight)
    for name, weight, tokens in (("default", 0.5, INVOKE), ("other", 2.0, (3,))):
        value = handle.extract(name)
        change = nn.functional.linear(x, value.delta("model.layers.0.self_attn.q_proj"))
        starts = last_start(ROWS, tokens)[:, None]
        expected = expected + weight * change * ((starts >= 0) & (torch.arange(9) >= starts))[..., None]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_nothing_stays_behind():
    model = tiny_llama()
    before = logits(model)
    handle = lorakit.attach(model, config())
    randomise(handle)
    handle.add("default", config(r=2), replace=True)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    handle.detach()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert torch.equal(logits(model), before)


def test_copies_count_for_themselves():
    model, _handle = activated()
    expected = logits(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
        torch.testing.assert_close(logits(again), expected)
        lorakit.adapters(again).detach()
        assert not again._forward_pre_hooks
    torch.testing.assert_close(logits(model), expected)


def test_a_pass_that_fails_leaves_nothing_running():
    model, _ = activated()
    expected = logits(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 10_000))
    torch.testing.assert_close(logits(model), expected)
    with pytest.raises(AdapterError, match=r"call the model itself, with input_ids"):
        model.model(input_ids=ROWS)
    with pytest.raises(AdapterError, match=r"call the model itself, with input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "changes",
    [
        {"delta": "dora"},
        {"bias": "all"},
        {"modules_to_save": ("norm",)},
        {"trainable_tokens": (1,)},
    ],
    ids=str,
)
def test_what_would_change_other_tokens_is_refused(changes):
    with pytest.raises(ConfigError, match=r"alora_invocation_tokens: not with .* before the invocation too"):
        config(**changes)


def qwen2_moe():
    sizes = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**DECODER_SIZES, **sizes))


def t5():
    return T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=97, decoder_start_token_id=0)
    )


@pytest.mark.parametrize(
    ("make", "targets", "message"),
    [
        (tiny_llama, "embeddings", "embed_tokens is no layer that multiplies each token by a matrix"),
        (tiny_llama, ("lm_head",), "lm_head is the output head"),
        (qwen2_moe, "experts", "down_proj is no layer that multiplies each token by a matrix"),
        (t5, "attention", "an encoder and a decoder have tokens of their own"),
    ],
)
def test_layers_without_a_token_for_each_place_are_refused_by_name(make, targets, message):
    with pytest.raises(TargetError, match=message):
        lorakit.attach(make(), config(target_modules=targets))


@pytest.mark.parametrize("soft_prompt", ["prompt", "prefix"])
def test_no_soft_prompt_stands_beside_it(soft_prompt):
    prompt = PromptConfig(soft_prompt=soft_prompt, virtual_tokens=2, prompt_init="random")
    with pytest.raises(AdapterError, match="soft prompt and an activated adapter"):
        lorakit.attach(tiny_llama(), config(), prompt=prompt)
    _, handle = activated()
    with pytest.raises(AdapterError, match="'second': a soft prompt and an activated adapter"):
        handle.add("second", prompt)
    assert handle.names == ("default",)
    other = lorakit.attach(tiny_llama(), prompt)
    with pytest.raises(AdapterError, match="remove the other one"):
        other.add("second", config())
    other.remove("default")
    other.add("second", config())


def test_it_is_not_merged(tmp_path):
    _model, handle = activated()
    with pytest.raises(AdapterError, match=r"aLoRA\) counts from its invocation \[7, 8\] on alone"), handle.merged():
        pass
    with pytest.raises(AdapterError, match="keep it unmerged"):
        handle.merge()
    tiny_llama().save_pretrained(tmp_path / "base")
    base = lorakit.models.load_weights(tmp_path / "base", "fp32", "cpu")
    value = lorakit.attach(base, handle.extract(), check_base=False).extract()
    with pytest.raises(AdapterError, match="keep it unmerged"):
        lorakit.merge(
            adapters=[value], model=str(tmp_path / "base"), output=tmp_path / "merged", verify=False, dtype="fp32"
        )
    assert not (tmp_path / "merged").exists()


def test_values_keep_the_invocation():
    _, handle = activated()
    value = handle.extract()
    _, other = activated(alora_invocation_tokens=(1, 2))
    assert value.compress(rank=2).config.alora_invocation_tokens == INVOKE
    assert value.scaled(2.0).config.alora_invocation_tokens == INVOKE
    assert lorakit.combine([value, value], [0.5, 0.5]).config.alora_invocation_tokens == INVOKE
    with pytest.raises(AdapterError, match="alora_invocation_tokens differ"):
        lorakit.combine([value, other.extract()], [0.5, 0.5])
    plain = Adapter(**{**vars(value), "config": config(alora_invocation_tokens=())})
    assert value.digest() != plain.digest()


def test_llama_cpp_is_told_and_others_refuse(tmp_path):
    model, handle = activated(target_modules="attention")
    path = handle.save("default", tmp_path / "a.gguf", format="gguf")
    field = gguf.GGUFReader(path).fields[gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS]
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    assert field.contents() == list(INVOKE)
    again = Adapter.load(path, model=model)
    assert again.config.alora_invocation_tokens == INVOKE
    expected = logits(model)
    fresh = tiny_llama()
    lorakit.attach(fresh, again)
    torch.testing.assert_close(logits(fresh), expected, rtol=1e-4, atol=1e-4)
    for format in ("vllm", "loralib", "ollama", "kohya"):
        with pytest.raises(AdapterFileError, match=r"activated by tokens \[7, 8\] \(aLoRA\)"):
            handle.extract().save(tmp_path / format, format=format, model=model)
