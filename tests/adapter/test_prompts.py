"""Soft prompts in a model: equal to PEFT's with the same tensors, packed, alone, padded and on a route; and refused
where they cannot be.
"""

import contextlib
import copy
import itertools

import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lorakit
from lorakit import LoRAConfig, PromptConfig
from lorakit.adapter.began import residual_form
from lorakit.adapter.in_use import first_tokens
from lorakit.data.batches import collate
from lorakit.errors import AdapterError, AdapterMismatchError, ConfigError, TargetError
from lorakit.fusion import fused
from lorakit.packing import packed_attention, packed_logits, separable_head
from lorakit.training.objectives import mean_loss
from tiny_models import SMALL, byte_tokenizer, tiny_gpt2, tiny_llama

# PEFT's own call of a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

P = 9
KINDS = ("prompt", "prefix")


def tiny_qwen2():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, initializer_range=0.3, max_position_embeddings=512)).eval()


def tiny_mistral():
    """Sees only the last 16 tokens."""
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, initializer_range=0.3, max_position_embeddings=512, sliding_window=16)
    return MistralForCausalLM(config).eval()


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen2": tiny_qwen2}


class Row:
    def __init__(self, ids, first_target=3):
        self.ids, self.trained = ids, [i >= first_target for i in range(len(ids))]


def some_rows(vocabulary=97, lengths=(5, 9, 9, 12, 40, 280)):
    generator = torch.Generator().manual_seed(0)
    beginning = torch.randint(3, vocabulary, (11,), generator=generator).tolist()
    own = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [Row(own[0]), *(Row(beginning + each) for each in own)]


def attached(make, kind, *, lora=True, **settings):
    model = make()
    prompt = PromptConfig(soft_prompt=kind, virtual_tokens=P, **settings)
    if lora:
        return model, lorakit.attach(model, LoRAConfig(r=4, init="random"), prompt=prompt)
    return model, lorakit.attach(model, prompt)


# ---------------------------------------------------------------- against PEFT


def peft_model(make, kind, prompt):
    """PEFT's model with a prompt of the same numbers."""
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
    theirs = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    model = peft.get_peft_model(make(), theirs(**settings)).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(prompt)
    return model


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_pefts(make, kind):
    model, ad = attached(make, kind, lora=False)
    theirs = peft_model(make, kind, ad.extract().prompt.values)
    ids = torch.tensor([row.ids[:14] for row in some_rows()[1:4]])
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    found = model(**ad.prompted(ids)).logits
    torch.testing.assert_close(found, expected)
    expected.sin().sum().backward()
    found.sin().sum().backward()
    (tensor,) = ad.trainable_tensors().values()
    torch.testing.assert_close(tensor.grad, theirs.prompt_encoder["default"].embedding.weight.grad)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_pefts_loss_and_gradient(make, kind):
    """Packed rows through fast kernels and fused loss, against PEFT row by row."""
    model, ad = attached(make, kind, lora=False)
    theirs = peft_model(make, kind, ad.extract().prompt.values)
    rows = some_rows()
    loss, count = mean_loss(model, rows)
    total = 0.0
    for row in rows:
        ids = torch.tensor([row.ids])
        labels = torch.tensor([[i if t else -100 for i, t in zip(row.ids, row.trained, strict=True)]])
        # PEFT gives a prefix's labels no shift of their own
        own = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        total = total + own * sum(row.trained)
    assert float(total.detach()) / count == pytest.approx(loss, rel=1e-5)
    (total / count).backward()
    with fused(model), packed_attention(model, 400) as packs:
        assert packs
        batch = collate(rows, range(len(rows)), share=True, first=first_tokens(model))
        logits = packed_logits(model, batch)
        torch.nn.functional.cross_entropy(logits.float(), batch.targets).backward()
    (tensor,) = ad.trainable_tensors().values()
    torch.testing.assert_close(
        tensor.grad, theirs.prompt_encoder["default"].embedding.weight.grad, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_encoders_compute_what_pefts_do(encoder):
    _, ad = attached(tiny_llama, "p_tuning", lora=False, prompt_encoder=encoder, encoder_hidden=24)
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        encoder_hidden_size=24,
        encoder_reparameterization_type=encoder.upper(),
    )
    theirs = peft.get_peft_model(tiny_llama(), config).prompt_encoder["default"]
    tensors = {name.partition(".prompt.")[2]: tensor for name, tensor in ad.trainable_tensors().items()}
    names = {"values": "embedding.weight"}
    for name in tensors:
        if name.startswith("encoder."):
            inner = name.removeprefix("encoder.")
            part, rest = ("mlp_head", inner) if encoder == "mlp" else inner.split(".", 1)
            names[name] = f"{'lstm_head' if part == 'lstm' else 'mlp_head'}.{rest}"
    with torch.no_grad():
        for ours, name in names.items():
            theirs.get_parameter(name).copy_(tensors[ours])
    torch.testing.assert_close(ad.extract().prompt.values, theirs(torch.arange(P)[None])[0].detach())
    assert set(names.values()) == {name for name, _ in theirs.named_parameters()}


def test_reparametrised_prefixes_compute_what_pefts_do():
    model, ad = attached(tiny_llama, "prefix", lora=False, prompt_encoder="mlp", encoder_hidden=24)
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=24
    )
    theirs = peft.get_peft_model(tiny_llama(), config).eval()
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        for name, tensor in ad.trainable_tensors().items():
            inner = name.partition(".prompt.")[2]
            inner = "embedding.weight" if inner == "values" else inner.replace("encoder.", "transform.")
            encoder.get_parameter(inner).copy_(tensor)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(model(**ad.prompted(ids)).logits, expected)
    # what is saved is what the encoder made, and attaches as that
    again = tiny_llama()
    back = lorakit.attach(again, ad.extract())
    torch.testing.assert_close(again(**back.prompted(ids)).logits, expected)
    assert [name.partition(".prompt.")[2] for name in back.trainable_tensors()] == ["values"]


# ---------------------------------------------------------------- packed, alone, padded, routed


def by_row(batch, logits, rows):
    counts = [sum(rows[i].trained[1:]) for i in batch.rows]
    return dict(zip(batch.rows, torch.split(logits, counts), strict=True))


@pytest.mark.parametrize("make", [*MODELS.values(), tiny_mistral], ids=[*MODELS, "sliding window"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_alone_with_gradients(make, kind):
    model, ad = attached(make, kind)
    rows = some_rows(lengths=(5, 9, 9, 12, 40, 300))
    results = []
    for context, share in ((contextlib.nullcontext(), False), (packed_attention(model, 400), True)):
        ad.model.zero_grad()
        with context as packs:
            assert bool(packs) == share
            batch = collate(rows, range(len(rows)), share=share, first=first_tokens(model))
            logits = packed_logits(model, batch)
            logits.float().sin().sum().backward()
        gradients = torch.cat([tensor.grad.flatten() for tensor in ad.trainable_tensors().values()])
        results.append((by_row(batch, logits.detach(), rows), gradients))
    (alone, gradient_alone), (packed, gradient_packed) = results
    for row in range(len(rows)):
        assert (packed[row] - alone[row]).abs().max() <= 5e-5 * alone[row].abs().max(), row
    assert (gradient_packed - gradient_alone).norm() <= 5e-5 * gradient_alone.norm()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_changes_nothing(make, kind):
    model, ad = attached(make, kind)
    rows = [row.ids[:n] for row, n in zip(some_rows()[1:4], (4, 9, 7), strict=True)]
    alone = [model(**ad.prompted(torch.tensor([row]))).logits[0, -len(row) :] for row in rows]
    for left in (True, False):
        ids, mask = (torch.zeros(3, 9, dtype=torch.long) for _ in range(2))
        for i, row in enumerate(rows):
            place = slice(9 - len(row), None) if left else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        batch = ad.prompted(ids, mask)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=positions).logits
        kept = batch["attention_mask"][:, -logits.shape[1] :].bool()
        for i, row in enumerate(rows):
            torch.testing.assert_close(logits[i][kept[i]][-len(row) :], alone[i], rtol=1e-4, atol=1e-4)


def routed_model(make):
    """Five adapters: a prompt with LoRA, two prefixes, a prompt, LoRA alone."""
    model = make()
    ad = lorakit.attach(
        model, LoRAConfig(r=4, init="random"), name="both", prompt=PromptConfig(soft_prompt="prompt", virtual_tokens=4)
    )
    ad.add("prefix", PromptConfig(soft_prompt="prefix", virtual_tokens=5), seed=1)
    ad.add("lora", LoRAConfig(r=4, init="random"), seed=2)
    ad.add("short", PromptConfig(soft_prompt="prefix", virtual_tokens=2), seed=3)
    ad.add("prompt", PromptConfig(soft_prompt="prompt", virtual_tokens=3), seed=4)
    return model, ad


NAMES = ["both", "prefix", None, "lora", "short", "prompt", "prefix"]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_routed_rows_are_what_each_is_alone_with_gradients(make):
    model, ad = routed_model(make)
    ids = torch.tensor([row.ids[:8] for row in some_rows(lengths=(8,) * 7)[1:]])

    def gradients():
        found = [tensor.grad for name in ad.names for tensor in ad.trainable_tensors(name).values()]
        model.zero_grad()
        return torch.cat([g.flatten() for g in found])

    alone = []
    for name, row in zip(NAMES, ids, strict=True):
        ad.activate(name)
        logits = model(**ad.prompted(row[None])).logits[0, -8:]
        logits.sin().sum().backward() if name else None
        alone.append(logits.detach())
    expected = gradients()
    ad.activate(None)
    with ad.route(NAMES):
        batch = ad.prompted(ids)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=positions).logits[:, -8:]
        for own, other in zip(logits, alone, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
        logits[[i for i, name in enumerate(NAMES) if name]].sin().sum().backward()
    assert (gradients() - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_updates_of_the_embedding_do_not_reach_virtual_tokens(kind):
    """As in PEFT's order of things, where a prompt is no row of the table."""
    model = tiny_llama(tie_word_embeddings=False)
    config = LoRAConfig(r=4, init="random", target_modules=("embed_tokens",))
    ad = lorakit.attach(model, config, prompt=PromptConfig(soft_prompt=kind, virtual_tokens=P))
    ids = torch.tensor([[5, 6, 7]])
    found = model(**ad.prompted(ids)).logits[:, -3:]
    embeddings = model.model.embed_tokens(ids)
    prompt = ad.extract().prompt
    if kind == "prompt":
        with ad.disabled():
            embeddings = torch.cat([prompt.values[None], embeddings], dim=1)
            torch.testing.assert_close(model(inputs_embeds=embeddings).logits[:, -3:], found)
    else:
        assert ad.summary()["adapters"]["default"]["layers"] == 1
    low_rank = {name: t for name, t in ad.trainable_tensors().items() if not name.endswith("prompt.values")}
    assert set(low_rank) == {"model.embed_tokens.A", "model.embed_tokens.B"}


# ---------------------------------------------------------------- how they begin


def test_a_text_is_what_the_model_would_read():
    tokenizer, ids = byte_tokenizer(), torch.tensor([[70, 71, 72]])
    text = tokenizer("answer in one word: ")["input_ids"]
    for kind in KINDS:
        model = tiny_llama()
        config = PromptConfig(soft_prompt=kind, virtual_tokens=len(text), prompt_text="answer in one word: ")
        ad = lorakit.attach(model, config, tokenizer=tokenizer)
        with ad.disabled():
            expected = model(torch.tensor([text + ids[0].tolist()])).logits[:, -3:]
        torch.testing.assert_close(model(**ad.prompted(ids)).logits[:, -3:], expected, rtol=1e-4, atol=1e-4)


def test_a_text_is_repeated_or_cut_as_pefts_is():
    tokenizer = byte_tokenizer()
    words = tokenizer("red blue")["input_ids"]
    for count in (3, len(words), 20):
        model = tiny_llama()
        config = PromptConfig(soft_prompt="prompt", virtual_tokens=count, prompt_text="red blue")
        value = lorakit.attach(model, config, tokenizer=tokenizer).extract()
        repeated = list(itertools.islice(itertools.cycle(words), count))
        torch.testing.assert_close(value.prompt.values, model.model.embed_tokens.weight[repeated].detach())


def test_other_beginnings():
    def values(**settings):
        model = tiny_llama()
        lorakit.attach(model, PromptConfig(virtual_tokens=200, **settings), seed=settings.pop("seed", 0))
        return lorakit.adapters(model).extract().prompt.values

    table = tiny_llama().model.embed_tokens.weight.detach()
    drawn = values(soft_prompt="prompt")
    assert all(bool((table == row).all(dim=1).any()) for row in drawn)
    assert values(soft_prompt="prompt", prompt_init="random").std() == pytest.approx(float(table.std()), rel=0.05)
    assert values(soft_prompt="prefix", prompt_init="random").std() == pytest.approx(1, rel=0.05)
    assert not values(soft_prompt="prefix", prompt_init="zero").any()
    assert not values(soft_prompt="prefix", prompt_init="zero", prompt_encoder="mlp").any()
    assert torch.equal(drawn, values(soft_prompt="prompt"))  # a function of the seed


# ---------------------------------------------------------------- lifecycle


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_behind(kind):
    model = tiny_llama()
    ids = torch.tensor([[5, 6, 7]])
    before, hooks = model(ids).logits, len(model._forward_pre_hooks)
    ad = lorakit.attach(model, PromptConfig(soft_prompt=kind, virtual_tokens=3))
    with ad.disabled():
        assert torch.equal(model(ids).logits, before)
    twin = copy.deepcopy(model)
    own = lorakit.adapters(twin)
    assert torch.equal(twin(**own.prompted(ids)).logits, model(**ad.prompted(ids)).logits)
    own.activate(None)
    assert torch.equal(twin(ids).logits, before)
    assert ad.active == {"default": 1.0}
    ad.detach()
    assert torch.equal(model(ids).logits, before)
    assert len(model._forward_pre_hooks) == hooks


def test_a_prompt_is_never_silently_absent():
    for kind in KINDS:
        model, ad = attached(tiny_llama, kind)
        ids = torch.tensor([[5, 6, 7], [7, 8, 9]])
        with pytest.raises(AdapterError, match="does not begin with its virtual tokens; call model"):
            model(ids)
        with pytest.raises(AdapterError, match="needs input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 32))
        with pytest.raises(IndexError):  # of another prompt, or of none
            model(ad.prompted(ids)["input_ids"].masked_fill(ad.prompted(ids)["input_ids"] == 7, 272 + 2 * P))
        with pytest.raises(AdapterError, match="cannot be folded"), ad.merged():
            pass
        with pytest.raises(AdapterError, match="cannot be folded"):
            ad.merge()
        with ad.route(["default", None]):
            batch = ad.prompted(ids)
            with pytest.raises(AdapterError, match="differ in length need an attention_mask"):
                model(batch["input_ids"])
            with pytest.raises(AdapterError, match="inside route"):
                first_tokens(model)


def test_prompts_have_no_sum_and_no_weight():
    model, ad = routed_model(tiny_llama)
    ad.activate({"both": 1.0, "lora": 0.5})
    with pytest.raises(AdapterError, match="'both', 'prompt' have a soft prompt each"):
        ad.activate(["both", "prompt"])
    with pytest.raises(AdapterError, match=r"no weight but 1 \(got 0.5\)"):
        ad.activate({"prefix": 0.5})
    with pytest.raises(AdapterError, match="have a soft prompt each"):
        ad.add("lora", PromptConfig(soft_prompt="prompt"), replace=True)
    assert ad.active == {"both": 1.0, "lora": 0.5}
    assert ad.summary()["adapters"]["lora"]["layers"] == 14  # the old one stayed
    ad.add("both", PromptConfig(soft_prompt="prefix", virtual_tokens=2), replace=True)
    assert model(**ad.prompted(torch.tensor([[5, 6]]))).logits.shape[1] == 2


def test_a_prompt_on_a_longer_vocabulary_of_another_adapter():
    """Ids are never shared, nor given twice."""
    _, ad = routed_model(tiny_llama)
    ids = {name: ad._resident(name).prompt.ids for name in ad.names if ad._resident(name).prompt}
    every = [token for own in ids.values() for token in own]
    assert len(set(every)) == len(every)
    assert min(every) == 272
    ad.remove("prompt")
    ad.add("new", PromptConfig(soft_prompt="prompt", virtual_tokens=3))
    assert ad._resident("new").prompt.first > max(every)


def test_values_come_back_as_they_were():
    for kind in KINDS:
        _, ad = attached(tiny_llama, kind)
        value = ad.extract()
        model = tiny_llama()
        assert lorakit.attach(model, value).extract().digest() == value.digest()
        assert value.without_prompt().prompt is None
        assert value.prompt_alone().prompt is value.prompt
        assert value.summary()["virtual_tokens"] == P
        other = tiny_llama(num_key_value_heads=4) if kind == "prefix" else tiny_llama(hidden_size=64)
        with pytest.raises(AdapterMismatchError, match="shape: prompt is"):
            lorakit.attach(other, value.prompt_alone(), check_base=False)
        for what in (lambda v: v.scaled(2.0), lambda v: lorakit.combine([v, v]), residual_form):
            with pytest.raises(AdapterError, match=rf"the adapter has a soft prompt besides \({P} virtual tokens"):
                what(value)
        compressed = value.compress(rank=2)
        assert compressed.prompt is value.prompt
        with pytest.raises(AdapterError, match="only a soft prompt"):
            value.prompt_alone().compress(rank=2)
        with pytest.raises(AdapterError, match="nothing is left"):
            value.prompt_alone().without_prompt()


# ---------------------------------------------------------------- refused


def mamba():
    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=97)).eval()


def deepseek():
    sizes = {k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    config = DeepseekV3Config(**sizes, **ranks, num_key_value_heads=4, first_k_dense_replace=2)
    return DeepseekV3ForCausalLM(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_only_causal_language_models_take_one(kind):
    config = PromptConfig(soft_prompt=kind)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    others = [
        torch.nn.Sequential(torch.nn.Linear(3, 3)),
        BertForSequenceClassification(BertConfig(**small)),
        T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)),
    ]
    for model in others:
        with pytest.raises(TargetError, match="is no causal language model"):
            lorakit.attach(model, config)


def test_a_prefix_needs_keys_and_values_of_one_shape_in_every_layer():
    prefix = PromptConfig(soft_prompt="prefix", virtual_tokens=4)
    with pytest.raises(TargetError, match="keys and values in every layer, and MambaForCausalLM keeps others"):
        lorakit.attach(mamba(), prefix)
    with pytest.raises(TargetError, match="differ in shape between layers or from each other"):
        lorakit.attach(deepseek(), prefix)
    with pytest.raises(TargetError, match="sees only 16 tokens at once, and a prefix of 20 would be cut"):
        lorakit.attach(tiny_mistral(), PromptConfig(soft_prompt="prefix", virtual_tokens=20))


def test_a_state_space_takes_embeddings():
    model = mamba()
    ad = lorakit.attach(model, PromptConfig(soft_prompt="prompt", virtual_tokens=4))
    prompts = [[5, 6, 7]]
    answers = lorakit.generate(model, byte_tokenizer(), prompts, max_new_tokens=6, stop_ids=frozenset())
    ids = list(prompts[0])
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(**ad.prompted(torch.tensor([ids]))).logits[0, -1].argmax()))
    assert list(answers[0].ids) == ids[3:]


def test_what_does_not_go_together_is_named():
    text = PromptConfig(soft_prompt="prompt", prompt_text="be brief")
    with pytest.raises(ConfigError, match="text needs a tokenizer"):
        lorakit.attach(tiny_llama(), text)
    with pytest.raises(TargetError, match="600 leave nothing of the context of 512 tokens"):
        lorakit.attach(tiny_llama(), PromptConfig(soft_prompt="prompt", virtual_tokens=600))
    with pytest.raises(TargetError, match="cannot be trained whole too"):
        lorakit.attach(
            tiny_llama(), LoRAConfig(modules_to_save=("embed_tokens",)), prompt=text, tokenizer=byte_tokenizer()
        )
    with pytest.raises(AdapterError, match="nothing is to be trained"):
        lorakit.attach(tiny_llama(), LoRAConfig(target_modules="none"))
    with pytest.raises(AdapterError, match="is for a fresh adapter of low-rank updates"):
        lorakit.attach(tiny_llama(), text, prompt=text)
    model, ad = attached(tiny_llama, "prefix")
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(AdapterError, match="turn gradient checkpointing off"):
        model(**ad.prompted(torch.tensor([[5, 6]])))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"soft_prompt": "prompt", "virtual_tokens": 0}, "virtual_tokens: must be at least 1"),
        ({"virtual_tokens": 4}, "virtual_tokens: has no meaning without soft_prompt"),
        ({"soft_prompt": "prompt", "prompt_init": "text"}, "text needs prompt_text"),
        (
            {"soft_prompt": "prompt", "prompt_init": "random", "prompt_text": "x"},
            "not looked at with prompt_init random",
        ),
        ({"soft_prompt": "prompt", "prompt_encoder": "mlp"}, "soft_prompt prompt takes none \\(got mlp\\)"),
        ({"soft_prompt": "prefix", "prompt_encoder": "lstm"}, "takes none or mlp"),
        ({"soft_prompt": "prompt", "prompt_init": "zero"}, "zero is for soft_prompt prefix"),
        ({"soft_prompt": "p_tuning", "prompt_text": "x"}, "an encoder begins with random numbers"),
        ({"soft_prompt": "p_tuning", "encoder_hidden": 0}, "encoder_hidden"),
        ({"soft_prompt": "p_tuning", "encoder_layers": 0}, "encoder_layers"),
    ],
)
def test_settings_at_odds(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        PromptConfig(**settings)


def test_spellings():
    config = PromptConfig.from_dict(
        {"soft_prompt": "PREFIX_TUNING", "num_virtual_tokens": 7, "prefix_projection": True, "encoder_hidden_size": 5}
    )
    assert config == PromptConfig(soft_prompt="prefix", virtual_tokens=7, prompt_encoder="mlp", encoder_hidden=5)
    assert PromptConfig(soft_prompt="p-tuning-v2").soft_prompt == "prefix"
    assert PromptConfig(soft_prompt="prompt", prompt_init="SAMPLE_VOCAB").init == "vocabulary"
    assert LoRAConfig(target_modules=["none"]).target_modules == "none"
    with pytest.raises(ConfigError, match="bias: has no meaning with target_modules none"):
        LoRAConfig(target_modules="none", bias="all")


def test_a_quantised_base_and_half_precision():
    model = tiny_llama().to(torch.bfloat16)
    for kind in KINDS:
        ad = lorakit.attach(model, PromptConfig(soft_prompt=kind, virtual_tokens=4))
        assert all(tensor.dtype == torch.float32 for tensor in ad.trainable_tensors().values())
        rows = some_rows()[:3]
        loss, _ = mean_loss(model, rows)
        assert 0 < loss < 50
        ad.detach()


def test_the_loss_is_fused_with_the_head_under_a_prompt_too():
    model, _ = attached(tiny_llama, "prefix", lora=False)
    with packed_attention(model, 64), torch.no_grad():
        assert separable_head(model) is model.lm_head
