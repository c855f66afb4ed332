"""The trunk that is run once: the same losses and gradients as with the whole model, and what is refused."""

import contextlib

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, MixtralConfig, Qwen3Config

from lorakit import machine
from lorakit.adapter.attach import attach
from lorakit.adapter.config import LoRAConfig
from lorakit.data.chat import Example
from lorakit.data.sources import Origin
from lorakit.errors import ConfigError, RunError
from lorakit.training.loop import accumulate, ready
from lorakit.training.objectives import mean_loss
from lorakit.training.optim import make_scaler
from lorakit.training.recomputing import checkpoint_activations
from lorakit.training.run import train
from lorakit.training.trunk import Trunk, kept_trunk, refuse_too_large, trunk_of
from tiny_models import SMALL, byte_tokenizer, tiny_gpt2, tiny_llama
from tiny_runs import StopAt, adapter_bytes, assert_same_run, configured, metrics

CPU = torch.device("cpu")


def examples(lengths, vocabulary=97, common=10):
    """Rows of random tokens that begin alike; of each, the second half is trained."""
    beginning = torch.randint(0, vocabulary, (common,), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for line, length in enumerate(lengths, 1):
        rest = torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(line)).tolist()
        ids = beginning + rest
        found.append(Example(ids, [place >= len(ids) // 2 for place in range(len(ids))], Origin("rows.jsonl", line)))
    return found


def random_update(tensors):
    with torch.no_grad():
        for number, tensor in enumerate(tensors.values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)) / 10)


FAMILIES = {
    "llama": lambda: tiny_llama(97, num_hidden_layers=4),
    # scaled embeddings, sliding windows on every other layer, norms around both halves of a layer
    "gemma2": lambda: _of(Gemma2Config(**SMALL | {"num_hidden_layers": 4, "sliding_window": 8})),
    "qwen3": lambda: _of(Qwen3Config(**SMALL | {"num_hidden_layers": 4})),
    "mixtral": lambda: _of(MixtralConfig(**SMALL | {"num_hidden_layers": 4, "num_local_experts": 3})),
}


def _of(config):
    torch.manual_seed(0)
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_whole_model(family, where, tmp_path):
    model = FAMILIES[family]()
    tensors = attach(model, LoRAConfig(r=4, layers=(2, 3), modules_to_save=("norm",))).trainable_tensors()
    random_update(tensors)
    rows = examples([5, 30, 12, 40, 7, 7, 33, 21])
    steps = [[[0, 4, 5], [1, 6]], [[2, 7], [3]]]

    def measured(trunk):
        found = []
        with ready(model, 64) as share, trunk:
            for number, step in enumerate(steps):
                found.append(
                    torch.tensor(accumulate(model, rows, step, make_scaler(torch.float32, CPU), 0, number, share=share))
                )
                found += [tensor.grad.clone() for tensor in tensors.values()]
                model.zero_grad(set_to_none=True)
            found.append(torch.tensor(mean_loss(model, rows, micro_batch_tokens=60)[0]))
        return found

    plain = measured(contextlib.nullcontext())
    folder = tmp_path if where == "disk" else None
    for micro_batch_tokens in (60, 1000):
        kept = measured(kept_trunk(model, rows, folder=folder, micro_batch_tokens=micro_batch_tokens))
        for one, other in zip(plain, kept, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max() + 1))
    assert list(tmp_path.iterdir()) == []
    assert all("forward" not in vars(module) for module in model.modules())
    for one, other in zip(plain, measured(contextlib.nullcontext()), strict=True):
        assert torch.equal(one, other)


def test_the_lower_layers_do_not_run():
    model = tiny_llama(97, num_hidden_layers=4)
    attach(model, LoRAConfig(r=4, layers=(3,)))
    rows, calls = examples([5, 30, 12]), []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))
    with kept_trunk(model, rows, folder=None, micro_batch_tokens=100):
        calls.clear()
        mean_loss(model, rows, micro_batch_tokens=100)
        assert set(calls) == {3}
        with pytest.raises(KeyError):  # a row that was not announced
            mean_loss(model, examples([13, 14]), micro_batch_tokens=100)
    calls.clear()
    mean_loss(model, rows, micro_batch_tokens=100)
    assert set(calls) == {0, 1, 2, 3}


def test_with_checkpointing_and_dropout_above_the_trunk():
    model = tiny_llama(97, num_hidden_layers=4)
    config = LoRAConfig(r=4, dropout=0.3, layers=(2, 3), target_modules=("q_proj", "down_proj"))
    tensors = attach(model, config).trainable_tensors()
    random_update(tensors)
    rows = examples([5, 30, 12])
    found = []
    for checkpointing in (False, True):
        checkpoint_activations(model, on=checkpointing)
        for trunk in (contextlib.nullcontext(), kept_trunk(model, rows, folder=None, micro_batch_tokens=100)):
            with ready(model, 64) as share, trunk:
                loss = accumulate(model, rows, [[0, 1, 2]], make_scaler(torch.float32, CPU), 0, 0, share=share)
            found.append([torch.tensor(loss), *(tensor.grad.clone() for tensor in tensors.values())])
            model.zero_grad(set_to_none=True)
    for plain, kept in (found[:2], found[2:]):  # checkpointing draws at other places: the last MLP then runs for all
        for one, two in zip(plain, kept, strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- size


def test_its_size_is_that_of_the_different_rows():
    model = tiny_llama(97, num_hidden_layers=4)
    attach(model, LoRAConfig(r=2, layers=(2, 3)))
    rows = examples([5, 30])
    read = len(rows[0].ids) + len(rows[1].ids) - 2  # what comes after the last token that predicts is not read
    assert trunk_of(model, [*rows, *rows]) == Trunk(2, read, read * 32 * 4)
    assert trunk_of(model.to(torch.bfloat16), rows) == Trunk(2, read, read * 32 * 2)


def test_what_lies_above_the_layers_may_be_trained_alone():
    model = tiny_llama(97, num_hidden_layers=4, tie_word_embeddings=False)
    attach(model, LoRAConfig(r=2, target_modules=("lm_head",), dropout=0.1))
    assert trunk_of(model, examples([5])).layers == 3


def test_what_does_not_fit_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "available_memory", lambda: 2_999_999)
    trunk = Trunk(3, 1000, 3_000_000)
    with pytest.raises(ConfigError, match=r"3 layers put out for 1,000 tokens takes 3 MB, .* set cache_trunk to disk"):
        refuse_too_large(trunk, None)
    refuse_too_large(trunk, tmp_path)
    with pytest.raises(ConfigError, match="leave cache_trunk off"):
        refuse_too_large(Trunk(3, 1000, 10**18), tmp_path)
    monkeypatch.setattr(machine, "available_memory", lambda: None)
    refuse_too_large(trunk, None)


# ---------------------------------------------------------------- refused


def with_dropout():
    model = tiny_llama(97, num_hidden_layers=4, attention_dropout=0.1)
    attach(model, LoRAConfig(r=2, layers=(3,)))
    return model


def with_dropout_layer():
    model = tiny_llama(97, num_hidden_layers=4)
    attach(model, LoRAConfig(r=2, layers=(3,)))
    model.model.layers[1].extra = torch.nn.Dropout(0.2)
    return model


def adapted(model, **config):
    attach(model, LoRAConfig(**{"r": 2, **config}))
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: adapted(tiny_gpt2(97), layers=(1,)), "GPT2LMHeadModel has no decoder layers"),
        (lambda: adapted(tiny_llama(97)), "layer 0 of LlamaForCausalLM is trained"),
        (
            lambda: adapted(tiny_llama(97), layers=(1,), trainable_tokens=(3,)),
            "model.embed_tokens.* is trained, which is",
        ),
        (
            lambda: adapted(tiny_llama(97), layers=(1,), modules_to_save=("embed_tokens",)),
            "model.embed_tokens.* is trained, which is",
        ),
        (with_dropout, "draws anew in each step below its trained layers \\(attention_dropout 0.1\\)"),
        (with_dropout_layer, "draws anew .* \\(model.layers.1.extra\\)"),
    ],
)
def test_models_of_which_nothing_can_be_kept_are_refused_by_name(make, reason):
    with pytest.raises(ConfigError, match=rf"cache_trunk: .*{reason}"):
        trunk_of(make(), examples([5]))


def test_models_that_cannot_pack_are_refused_by_name(monkeypatch):
    model = adapted(tiny_llama(97, num_hidden_layers=4), layers=(3,))
    monkeypatch.setattr("lorakit.packing._probe", lambda model: 0)
    with (
        pytest.raises(ConfigError, match="rows of LlamaForCausalLM cannot be packed"),
        kept_trunk(model, examples([5]), folder=None, micro_batch_tokens=100),
    ):
        pass


def test_models_whose_layers_tell_each_other_more_are_refused_by_name(tmp_path):
    model, told = adapted(tiny_llama(97, num_hidden_layers=4), layers=(2,)), {}
    model.model.layers[0].register_forward_hook(lambda module, args, output: told.update(output=output))
    model.model.layers[2].register_forward_hook(lambda module, args, output: output + told["output"] / 2)
    with (
        pytest.raises(ConfigError, match="gives other logits when its first 2 layers are passed over"),
        kept_trunk(model, examples([5, 30]), folder=tmp_path, micro_batch_tokens=100),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    assert all("forward" not in vars(module) for module in model.modules())


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def upper(settings, tmp_path_factory):
    """A run that trains the upper two layers of four, for three epochs."""
    folder = tmp_path_factory.mktemp("deep")
    tiny_llama(context=512, num_hidden_layers=4).save_pretrained(folder)
    byte_tokenizer(eos="<|im_end|>").save_pretrained(folder)
    lora = {"r": 4, "alpha": 8.0, "layers": [2, 3]}
    return {**settings, "model": str(folder), "lora": lora, "max_steps": 20}


@pytest.fixture(scope="module")
def plain(upper, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(configured(upper, folder))
    return folder


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_run_is_the_run_without(upper, plain, tmp_path, where):
    events = []
    train(configured(upper, tmp_path / "run", cache_trunk=where), events.append)
    for one, other in zip(metrics(plain), metrics(tmp_path / "run"), strict=True):
        assert one == pytest.approx(other, rel=2e-4)
    kept = next(event for event in events if type(event).__name__ == "TrunkKept")
    assert kept.layers == 2
    assert kept.nbytes == kept.tokens * 32 * 4
    assert not list((tmp_path / "run").glob(".tmp-*"))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_run_goes_on_with_a_trunk_made_anew(upper, tmp_path, where):
    train(configured(upper, tmp_path / "straight", cache_trunk=where))
    train(configured(upper, tmp_path / "broken", cache_trunk=where), StopAt(9))
    (tmp_path / "broken" / ".tmp-trunk").write_bytes(b"of a run that was killed")
    train(configured(upper, tmp_path / "broken", cache_trunk=where, resume=True))
    assert_same_run(tmp_path / "straight", tmp_path / "broken")
    assert adapter_bytes(tmp_path / "straight", "best") == adapter_bytes(tmp_path / "broken", "best")


def test_a_run_in_bf16(upper, tmp_path):
    for where in ("off", "memory"):
        train(configured(upper, tmp_path / where, cache_trunk=where, dtype="bf16"))
    for one, other in zip(metrics(tmp_path / "off"), metrics(tmp_path / "memory"), strict=True):
        assert one == pytest.approx(other, rel=0.05)


def test_a_run_that_cannot_is_refused_before_the_model_is_loaded(upper, tmp_path, monkeypatch):
    events = []
    with pytest.raises(ConfigError, match="layer 0 of LlamaForCausalLM is trained"):
        train(configured({**upper, "lora": {"r": 4}}, tmp_path / "run", cache_trunk="memory"), events.append)
    assert not any(type(event).__name__ == "ModelReady" for event in events)
    monkeypatch.setattr(machine, "memory_for", lambda device: 1000)
    with pytest.raises(RunError, match=r"of it for cache_trunk, and more than the 1 kB .* --cache-trunk disk"):
        train(configured(upper, tmp_path / "run", cache_trunk="memory"))


def test_off_as_yaml_reads_it(upper, tmp_path):
    assert configured(upper, tmp_path, cache_trunk=False).cache_trunk == "off"
