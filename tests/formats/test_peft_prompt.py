"""Soft prompts in PEFT's files: PEFT computes with ours what we compute, we with its; and both kinds in one folder."""

import copy
import json
import shutil

import peft
import pytest
import torch

import lorakit
from lorakit import Adapter, LoRAConfig, PromptConfig
from lorakit.errors import AdapterFileError
from lorakit.files import read_safetensors, write_safetensors
from lorakit.formats import CODECS, Context, codec, recognise
from lorakit.models import adapter_base, load_tokenizer
from tiny_models import byte_tokenizer, tiny_gpt2, tiny_llama

# PEFT's own call of a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
OURS = {
    "prompt": PromptConfig(soft_prompt="prompt", virtual_tokens=6),
    "text": PromptConfig(soft_prompt="prompt", virtual_tokens=6, prompt_text="be brief"),
    "p_tuning": PromptConfig(soft_prompt="p_tuning", virtual_tokens=6, encoder_hidden=8),
    "lstm": PromptConfig(soft_prompt="p_tuning", virtual_tokens=6, prompt_encoder="lstm", encoder_hidden=8),
    "prefix": PromptConfig(soft_prompt="prefix", virtual_tokens=6),
    "projected prefix": PromptConfig(soft_prompt="prefix", virtual_tokens=6, prompt_encoder="mlp"),
}
THEIRS = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "p_tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, encoder_hidden_size=8),
    "lstm": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"
    ),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "projected prefix": peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=8
    ),
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -4:]


def our_logits(model, handle):
    with torch.no_grad():
        return model(**handle.prompted(IDS)).logits[:, -4:]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("config", OURS.values(), ids=OURS)
def test_peft_reads_ours(make, config, tmp_path):
    model = make()
    handle = lorakit.attach(model, config, tokenizer=byte_tokenizer())
    handle.save("default", tmp_path / "ours")
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), our_logits(model, handle))
    back = Adapter.load(tmp_path / "ours")
    assert back.digest() == handle.extract().digest()
    assert back.prompt.config.soft_prompt == config.soft_prompt
    back.save(tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("config", THEIRS.values(), ids=THEIRS)
def test_we_read_pefts(make, config, tmp_path):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(make(), copy.deepcopy(config)).eval()  # it writes the model's sizes into it
    theirs.save_pretrained(tmp_path)
    assert recognise(tmp_path) == "peft"
    model = make()
    handle = lorakit.attach(model, tmp_path)
    torch.testing.assert_close(our_logits(model, handle), logits(theirs))
    # written again, PEFT reads it as before; the tensor is its own, bit for bit
    handle.save("default", tmp_path / "ours")
    (before, _), (after, _) = (read_safetensors(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "ours"))
    assert before.keys() == after.keys() == {"prompt_embeddings"}
    assert torch.equal(before["prompt_embeddings"], after["prompt_embeddings"])
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    assert torch.equal(logits(again), logits(peft.PeftModel.from_pretrained(make(), tmp_path)))


def test_pefts_config_says_how_a_prompt_began(tmp_path):
    model = tiny_llama()
    model.config._name_or_path = "somebody/model"
    config = PromptConfig(soft_prompt="prompt", virtual_tokens=6, prompt_text="be brief")
    lorakit.attach(model, config, tokenizer=byte_tokenizer()).save("default", tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["prompt_tuning_init"], written["prompt_tuning_init_text"]) == ("TEXT", "be brief")
    assert written["tokenizer_name_or_path"] == "somebody/model"
    assert Adapter.load(tmp_path).prompt.config.prompt_text == "be brief"
    assert isinstance(peft.PeftConfig.from_pretrained(tmp_path), peft.PromptTuningConfig)


# ---------------------------------------------------------------- both kinds


@pytest.fixture
def both(tmp_path):
    """(model, its adapter of both kinds saved in tmp_path / "both")."""
    model = tiny_llama()
    prompt = PromptConfig(soft_prompt="prefix", virtual_tokens=6)
    handle = lorakit.attach(model, LoRAConfig(r=4, init="random"), prompt=prompt)
    handle.save("default", tmp_path / "both")
    return model, handle


def test_both_kinds_in_one_folder(both, tmp_path):
    model, handle = both
    folder = tmp_path / "both"
    assert sorted(path.name for path in folder.iterdir()) == ["lora", "lorakit_adapter.json", "prompt"]
    value = Adapter.load(folder)
    assert value.digest() == handle.extract().digest()
    assert value.base == handle.extract().base
    other = tiny_llama()
    assert torch.equal(our_logits(other, lorakit.attach(other, folder)), our_logits(model, handle))
    # each part is PEFT's, by itself
    parts = [peft.PeftModel.from_pretrained(tiny_llama(), folder / part) for part in ("lora", "prompt")]
    assert [part.peft_config["default"].peft_type.value for part in parts] == ["LORA", "PREFIX_TUNING"]
    alone = tiny_llama()
    torch.testing.assert_close(logits(parts[0]), our_logits(alone, lorakit.attach(alone, value.without_prompt())))
    # and no tool takes one part for the whole
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        peft.PeftConfig.from_pretrained(folder)


def test_the_folder_of_both_is_found_as_an_adapter(both, tmp_path):
    folder = tmp_path / "both"
    assert recognise(folder) == recognise(folder / "lorakit_adapter.json") == "peft"
    assert adapter_base(folder) is None
    byte_tokenizer().save_pretrained(folder)
    assert len(load_tokenizer(folder)) == len(byte_tokenizer())


def test_a_folder_of_the_other_form_is_not_written_over(both, tmp_path):
    value = Adapter.load(tmp_path / "both")
    with pytest.raises(AdapterFileError, match="holds another adapter"):
        value.without_prompt().save(tmp_path / "both")
    value.prompt_alone().save(tmp_path / "alone")
    with pytest.raises(AdapterFileError, match="holds another adapter"):
        value.save(tmp_path / "alone")


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_folders_are_refused(both, tmp_path):
    folder = tmp_path / "both"

    def refused(change, match):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder, broken)
        change(broken)
        with pytest.raises(AdapterFileError, match=match):
            Adapter.load(broken)

    refused(lambda f: shutil.rmtree(f / "prompt"), "without its folder prompt")
    refused(lambda f: (f / "lorakit_adapter.json").write_text("{"), "lorakit_adapter.json")
    refused(lambda f: (f / "lorakit_adapter.json").write_text("{}"), "not a manifest of this version")
    refused(
        lambda f: (shutil.rmtree(f / "lora"), shutil.copytree(f / "prompt", f / "lora")), "must hold low-rank updates"
    )
    refused(lambda f: edited(f / "prompt", num_virtual_tokens=7), "values .* for 7 virtual tokens")
    refused(lambda f: edited(f / "prompt", num_layers=None), "say how it is divided")
    refused(lambda f: edited(f / "prompt", num_attention_heads=3), "say how it is divided")
    refused(lambda f: edited(f / "prompt", num_layers=3), "and KeyValues")
    refused(lambda f: edited(f / "prompt", num_transformer_submodules=2), "in two stacks")
    refused(lambda f: edited(f / "prompt", modules_to_save=["lm_head"]), "modules_to_save is")
    refused(lambda f: edited(f / "prompt", peft_type="CPT"), "this version reads LORA, PROMPT_TUNING")
    nan = {"prompt_embeddings": torch.full((6, 64), torch.nan)}
    refused(lambda f: write_safetensors(f / "prompt" / "adapter_model.safetensors", nan, {}), "different bases")
    other = {"prompt": torch.zeros(6, 64)}
    refused(lambda f: write_safetensors(f / "prompt" / "adapter_model.safetensors", other, {}), "one tensor")


def test_every_other_format_refuses_a_prompt_by_name(both, tmp_path):
    value = Adapter.load(tmp_path / "both")
    for name in CODECS:
        for part in (value, value.prompt_alone()):
            problems = codec(name).obstacles(part, Context())
            if name == "peft":
                assert not problems
            else:
                assert any("a soft prompt, 6 virtual tokens (prefix), which" in problem for problem in problems), name
