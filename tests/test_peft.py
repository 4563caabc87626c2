"""Adapters travel both ways between here and PEFT, and what does not fit is refused.

Everything that trains is set to random numbers before an adapter is written, so that a tensor that
does not arrive, or arrives in the wrong place or at the wrong scale, shows in the logits.
"""

import json
import math
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")

from conftest import make_tokenizer, tiny  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import train_dpo  # noqa: E402
import train_sft  # noqa: E402
from nanoalign import InputError  # noqa: E402
from nanoalign.chatml import IM_END, IM_START  # noqa: E402
from nanoalign.fast.dropout import Dropout  # noqa: E402
from nanoalign.formats import peft as formats_peft  # noqa: E402
from nanoalign.formats.peft import trained_tensors  # noqa: E402
from nanoalign.lora import LoRALinear, TokenRows  # noqa: E402
from nanoalign.losses import sigmoid  # noqa: E402
from nanoalign.model import generation  # noqa: E402
from nanoalign.packing import Example  # noqa: E402
from nanoalign.run.device import computes_in  # noqa: E402
from nanoalign.run.flags import DPOConfig, SFTConfig  # noqa: E402
from nanoalign.run.policy import load_policy, save_policy  # noqa: E402
from nanoalign.run.reference import reference_of  # noqa: E402
from nanoalign.tools import merge  # noqa: E402

SEQUENCES = [
    Example(list(range(7, 19)), [([40, 41, 42, 43], [True] * 4), ([50, 51], [True] * 2)]),
    Example([60, 3, 9], [(list(range(100, 109)), [True] * 9)]),
]
TARGETS = ["all-linear", ["q_proj", "down_proj"], ["v_proj"], r".*layers\.1\..*(k|up)_proj"]
SETTINGS = {
    "plain": {},
    "rslora": dict(use_rslora=True),
    "bias of LoRA layers": dict(bias="lora_only", target_modules=["q_proj", "up_proj"]),
    "all biases": dict(bias="all", target_modules=["q_proj", "up_proj"]),
    "head": dict(modules_to_save=["lm_head"]),
    "embedding": dict(modules_to_save=["embed_tokens"]),
    "norms": dict(modules_to_save=["norm"]),  # all whose name ends so
    "MLPs": dict(modules_to_save=["mlp"]),  # LoRA on what is left
    "attention": dict(modules_to_save=["0.self_attn"]),
    "LoRA on the head": dict(target_modules=["q_proj", "lm_head"]),
    "LoRA on the embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "dropout": dict(lora_dropout=0.3),
    **{f"targets {target}": dict(target_modules=target) for target in TARGETS},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Model directories: Llama with every bias, untied and tied; Qwen2 (biases on q, k, v)."""
    made = {}
    for name, kind, model, more in (
        ("untied", LlamaConfig, LlamaForCausalLM, dict(attention_bias=True, mlp_bias=True)),
        ("tied", LlamaConfig, LlamaForCausalLM, dict(tie_word_embeddings=True)),
        ("qwen2", Qwen2Config, Qwen2ForCausalLM, {}),
    ):
        directory = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model(tiny(kind, **more)).save_pretrained(directory)
        make_tokenizer().save_pretrained(directory)
        made[name] = str(directory)
    return made


FROM_PEFT = {
    "token rows": dict(trainable_token_indices=[5, 9]),
    "full names": dict(target_modules=["model.layers.1.mlp.up_proj", "layers.0.self_attn.k_proj"]),
    "normal init": dict(init_lora_weights="gaussian"),
}


def combinations(settings):
    """Every setting on the untied base, and on another one where that makes a difference."""
    tied = ("plain", "head", "embedding", "token rows", "LoRA on the head", "LoRA on the embedding")
    for what, how in settings.items():
        for base in ["untied", *["tied"] * (what in tied), *["qwen2"] * ("bias" in how)]:
            yield pytest.param(base, how, id=f"{what}, {base}")


def policy_of(base, **flags):
    """load_policy in fp32 on the CPU, with the words of LoraConfig."""
    names = {"r": "lora_r", "bias": "lora_bias", "target_modules": "lora_target_modules",
             "modules_to_save": "lora_modules_to_save"}  # fmt: skip
    flags = {names.get(name, name): value for name, value in flags.items()}
    if isinstance(flags.get("lora_target_modules"), str):
        flags["lora_target_modules"] = [flags["lora_target_modules"]]
    cfg = dict(model_name_or_path=base, dtype="float32", device="cpu", dataset_name=["-"])
    return load_policy(SFTConfig(**(cfg | flags)))


def randomize(parameters, std=0.1, seed=5):
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.data.normal_(std=std)


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def plain_logps(model):
    """log-probs of the completions in SEQUENCES from all logits, one sequence at a time."""
    sums = []
    for prompt, completions in [(e.prompt, e.texts) for e in SEQUENCES]:
        for completion, _ in completions:
            ids = torch.tensor([prompt + completion])
            logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            sums.append(logps.gather(1, ids[0, len(prompt) :, None]).sum())
    return torch.stack(sums)


@pytest.fixture
def ids():
    return torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------- there and back


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")  # what it warns of is tested
@pytest.mark.parametrize("base, how", combinations(SETTINGS))
def test_our_adapter_in_peft(base, how, bases, ids, tmp_path):
    policy = policy_of(bases[base], **{"r": 4, "lora_alpha": 6, **how})
    randomize(p for p in policy.model.parameters() if p.requires_grad)
    save_policy(policy, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(bases[base])
    far = logits_of(plain, ids)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    with generation(policy) as ours, torch.no_grad():
        expected = logits_of(theirs, ids)
        assert (far - expected).abs().max() > 0.1  # the adapter does something
        torch.testing.assert_close(logits_of(ours, ids), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        packed = policy.lm.eval()(SEQUENCES).logps
    torch.testing.assert_close(packed, plain_logps(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("base, how", combinations(SETTINGS | FROM_PEFT))
def test_pefts_adapter_here(base, how, bases, ids, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(bases[base])
    far = logits_of(plain, ids)
    how = {"target_modules": "all-linear", **how}
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **how)
    theirs = peft.get_peft_model(plain, config).eval()
    randomize(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    policy = policy_of(bases[base], adapter_name_or_path=str(tmp_path))
    expected = logits_of(theirs, ids)
    assert (far - expected).abs().max() > 0.1
    with generation(policy) as ours, torch.no_grad():
        torch.testing.assert_close(logits_of(ours, ids), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        packed = policy.lm.eval()(SEQUENCES).logps
    torch.testing.assert_close(packed, plain_logps(theirs), rtol=1e-5, atol=1e-5)


QV = ["q_proj", "v_proj"]
TABLES = ["embed_tokens", "lm_head"]
THERE_AND_BACK = {  # LoraConfig's words; `resize` is a number of tokens more, before training
    "ranks": dict(rank_pattern={"layers.0.self_attn.q_proj": 4, "q_proj": 2, r"^model.*0.*v_.+": 3},
                  alpha_pattern={"q_proj": 32.0}),
    "ranks, rslora": dict(rank_pattern={"v_proj": 2}, alpha_pattern={r".*\.1\..*": 5},
                          use_rslora=True),
    "a layer": dict(layers_to_transform=[1]),
    "a layer by name": dict(layers_to_transform=0, layers_pattern="layers"),
    "excluded": dict(target_modules="all-linear", exclude_modules=["down_proj", "1.mlp.up_proj"]),
    "excluded by a regex": dict(target_modules=[*QV, "k_proj"], exclude_modules=r".*\.0\..*v_proj"),
    "absent": dict(target_modules=[*QV, "c_attn"]),  # PEFT passes over what is not there
    "head": dict(target_modules=[*QV, "lm_head"], lora_dropout=0.1),
    "embedding": dict(target_modules=[*QV, "embed_tokens"]),
    "head and embedding": dict(target_modules=[*QV, *TABLES]),
    "tables whole": dict(modules_to_save=TABLES),
    "tied embedding whole": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "tied tables whole": dict(modules_to_save=TABLES, ensure_weight_tying=True),
    "tied": dict(ensure_weight_tying=True),
    "norms": dict(modules_to_save=["norm"]),
    "MLPs whole": dict(target_modules="all-linear", modules_to_save=["mlp"]),
    "attention whole": dict(target_modules="all-linear", modules_to_save=["1.self_attn"]),
    "more tokens": dict(resize=2),
    "more tokens, LoRA on both tables": dict(resize=2, target_modules=[*QV, *TABLES]),
    "more tokens, tables whole": dict(resize=2, modules_to_save=TABLES),
    "more tokens, rows": dict(resize=2, trainable_token_indices={"embed_tokens": [320, 321]}),
    "fewer tokens": dict(resize=-20),
    "tables beside": dict(save_embedding_layers=True),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "base, case",
    [("untied", case) for case in THERE_AND_BACK]
    + [
        ("tied", case) for case in THERE_AND_BACK if re.search("tokens|head|table|embed|tied", case)
    ],
)
def test_an_adapter_of_peft_goes_on_and_back(base, case, bases, ids, tmp_path):
    """Opened, trained for a step, saved, opened in PEFT and here, and merged: the same logits."""
    how = {"target_modules": QV, **THERE_AND_BACK[case]}
    resize, beside = how.pop("resize", 0), how.pop("save_embedding_layers", "auto")
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(bases[base]), make_tokenizer()
    if resize:
        tokenizer.add_tokens([f"<|{i}|>" for i in range(320 + resize - len(tokenizer))])
        plain.resize_token_embeddings(320 + resize)
    config = peft.LoraConfig(r=8, lora_alpha=6, task_type="CAUSAL_LM", **how)
    theirs = peft.get_peft_model(plain, config).eval()
    torch.manual_seed(5)
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=beside)
    tokenizer.save_pretrained(tmp_path / "theirs")
    ids = torch.cat([ids, ids % 2 + 320], 1).clamp(max=319 + resize)  # with the new ones
    expected = logits_of(theirs, ids)

    policy = policy_of(None, adapter_name_or_path=str(tmp_path / "theirs"))
    with generation(policy) as ours:
        torch.testing.assert_close(logits_of(ours, ids), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        packed = policy.lm.eval()(SEQUENCES).logps
    torch.testing.assert_close(packed, plain_logps(theirs), rtol=1e-5, atol=1e-5)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    policy.lm.train()(SEQUENCES).logps.sum().backward()
    for parameter in trained:
        parameter.data.add_(parameter.grad, alpha=1e-2 / max(1e-2, parameter.grad.norm()))
    with generation(policy) as ours:
        moved = logits_of(ours, ids)
    assert (moved - expected).abs().max() > 1e-3
    save_policy(policy, tmp_path / "ours")
    plain = AutoModelForCausalLM.from_pretrained(bases[base])
    plain.resize_token_embeddings(320 + resize)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    torch.testing.assert_close(logits_of(again, ids), moved, rtol=1e-5, atol=1e-5)
    with generation(policy_of(None, adapter_name_or_path=str(tmp_path / "ours"))) as ours:
        assert torch.equal(logits_of(ours, ids), moved)
    merge.main([str(tmp_path / "ours"), str(tmp_path / "merged"), "--device", "cpu"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(merged, ids), moved, rtol=1e-4, atol=1e-4)


def test_dropout_in_training_is_pefts(bases, ids, tmp_path):
    """With torch's masks from one seed: the same place, rate and scale."""
    policy = policy_of(bases["untied"], lora_dropout=0.3)
    randomize(p for p in policy.model.parameters() if p.requires_grad)
    save_policy(policy, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(bases["untied"])
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    policy.model.set_attn_implementation(policy.attention)
    for module in policy.model.modules():
        if isinstance(module, LoRALinear):
            module.dropout = torch.nn.Dropout(module.dropout.p)
    results = []
    for model in (policy.model, theirs):
        model.train()
        torch.manual_seed(3)
        results.append(logits_of(model, ids))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert (results[0] - logits_of(theirs.eval(), ids)).abs().max() > 0.1


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dropout_by_definition(p, dtype):
    """An element is dropped whose 16 bits, as a number, are among the lowest; the others grow."""
    x, dropped = torch.randn(3, 50, 7, dtype=dtype), min(max(1, round(p * 2**16)), 2**16 - 1)
    torch.manual_seed(1)
    words = torch.empty(263, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:1050].view_as(x).int() + 2**15
    torch.manual_seed(1)
    kept = (bits >= dropped).to(dtype) * (2**16 / (2**16 - dropped))
    assert torch.equal(Dropout(p)(x), x * kept)


@pytest.mark.parametrize("p", [0, 1])
def test_dropout_of_nothing_and_of_all_is_torch_s(p):
    x = torch.randn(3, 50)
    assert torch.equal(Dropout(p)(x), torch.nn.Dropout(p)(x))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9999999])
def test_dropout_on_a_cpu_drops_a_share_p_and_keeps_the_mean(p):
    """Every fourth element shares a 64-bit word's lane: each lane drops p, within five sigma."""
    x = torch.ones(3, 33_333, requires_grad=True)  # no multiple of 4
    dropout = Dropout(p)
    torch.manual_seed(0)
    y = dropout(x)
    torch.manual_seed(0)
    assert torch.equal(y, dropout(x))
    dropped = min(round(p * 2**16), 2**16 - 1) / 2**16
    assert set(y.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - dropped)).item()}
    for lane in range(4):
        part = (y.flatten()[lane::4] == 0).float()
        sigma = math.sqrt(dropped * (1 - dropped) / len(part))
        assert abs(part.mean() - dropped) < 5 * sigma
    y.sum().backward()
    assert torch.equal(x.grad, y)  # x is 1: the gradient is the mask and its scale
    assert torch.equal(dropout.eval()(x), x)


def test_the_file_says_what_it_holds(bases, tmp_path):
    """Names and settings in the words of PEFT; weights in fp32."""
    save_policy(policy_of(bases["untied"], r=4, lora_dropout=0.3, use_rslora=True), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert tensors[name].shape == (4, 32) and tensors[name].dtype == torch.float32
    assert len(tensors) == 2 * 7 * 2  # A and B of 7 projections in 2 layers
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_dropout, config.use_rslora) == (4, 0.3, True)
    assert config.base_model_name_or_path == bases["untied"] and config.task_type == "CAUSAL_LM"
    assert config.target_modules >= {"q_proj", "down_proj"} and config.modules_to_save is None


# ---------------------------------------------------------------------------------- what is refused


def edited(adapter, directory, edit):
    """A copy of an adapter whose tensors went through `edit`."""
    directory.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return str(directory)


WHOLE = {  # --lora_modules_to_save -> what is wrong with it
    "layers": "holds whole layers; expected a module inside of them",
    "model": "holds whole layers",
    "1": "holds whole layers",
    "proj": "is a layer that LoRA trains",  # PEFT: all that ends so
    "mlp up_proj": "mlp: holds another module that is named",
    "act_fn": "has no weights",
    "none": "the model has no module of that name",
}


@pytest.mark.parametrize("names", WHOLE)
def test_modules_that_can_not_train_whole(names, bases):
    with pytest.raises(InputError, match=f"^--lora_modules_to_save .*{WHOLE[names]}"):
        policy_of(bases["untied"], modules_to_save=names.split())


@pytest.mark.parametrize("where", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_regex_without_an_end(where, bases, tmp_path, monkeypatch):
    """Each letter more nearly doubles the ways to match."""
    monkeypatch.setattr(formats_peft, "PATIENCE", 1)
    save_policy(policy_of(bases["untied"], r=4), tmp_path)
    path, regex = tmp_path / "adapter_config.json", r"(.|..|...)*!"
    change = {where: {regex: 4} if where == "rank_pattern" else regex}
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    fault = f"{path}: {where}.*: as a regex it takes more than 1 seconds"
    with pytest.raises(InputError, match=fault):
        policy_of(bases["untied"], adapter_name_or_path=str(tmp_path))


def test_tensors_that_do_not_fit(bases, tmp_path):
    base, good = bases["untied"], tmp_path / "good"
    save_policy(policy_of(base, r=4), good)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    short = name.removeprefix("base_model.model.")
    cases = {
        "lacks 1 tensors": lambda t: t.pop(name),
        "also has 1 tensors": lambda t: t.update({name + "2": torch.zeros(1)}),
        r"shape \(64, 3\)": lambda t: t.update({name: torch.zeros(64, 3)}),
    }
    for number, (message, edit) in enumerate(cases.items()):
        bad = edited(good, tmp_path / str(number), edit)
        with pytest.raises(InputError, match=message) as caught:
            policy_of(base, adapter_name_or_path=bad)
        assert short in str(caught.value)
    policy_of(base, adapter_name_or_path=edited(good, tmp_path / "same", lambda t: None))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(use_dora=True), "use_dora"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(alora_invocation_tokens=[3]), "alora_invocation_tokens"),
        (dict(some_later_variant=True), "some_later_variant"),
        (dict(init_lora_weights="pissa"), "init_lora_weights pissa"),  # another base
        (dict(peft_type="IA3"), "IA3"),
        (dict(r=3), "shape"),
        (dict(target_modules=["q_proj"]), "also has"),
        (dict(bias="all"), "lacks"),
        (dict(modules_to_save=["lm_head"]), "lacks 1 tensors"),
        (dict(target_modules=["no_such_layer"]), "no_such_layer"),
    ],
    ids=str,
)
def test_configs_that_do_not_fit(change, message, bases, tmp_path):
    save_policy(policy_of(bases["untied"], r=4), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        policy_of(bases["untied"], adapter_name_or_path=str(tmp_path))


def test_an_adapter_of_another_base(bases, tmp_path):
    """Qwen2 has the same layers but no bias to train on o_proj."""
    save_policy(policy_of(bases["untied"], r=4, bias="all"), tmp_path)
    with pytest.raises(InputError, match="another base"):
        policy_of(bases["qwen2"], adapter_name_or_path=str(tmp_path))


# --------------------------------------------------------------------------- which base it is for


def named(directory):
    return json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_an_adapter_names_the_base_that_it_was_trained_on(bases, tmp_path, monkeypatch):
    """By its whole path; when it goes on, by that of the base which it goes on with."""
    for name in ("one", "two"):
        shutil.copytree(bases["untied"], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    save_policy(policy_of("one", r=4), tmp_path / "first")
    assert named(tmp_path / "first") == str(tmp_path / "one")
    save_policy(policy_of("two", adapter_name_or_path="first"), tmp_path / "second")
    assert named(tmp_path / "second") == str(tmp_path / "two")
    monkeypatch.chdir("/")
    policy_of(None, adapter_name_or_path=str(tmp_path / "second"))


@pytest.mark.parametrize(
    "name", ["/gone/base", "../base", "./base", "models/base", "gone/a/b/base"]
)
def test_a_base_that_moved_together_with_its_adapter(name, bases, tmp_path, monkeypatch, capsys):
    """Or whose path counted from another directory: this one. What could be the hub's is asked for
    there only if no directory above the adapter has it."""
    adapter = tmp_path / "models" / "adapter"
    save_policy(policy_of(bases["untied"], r=4), adapter)
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace(bases["untied"], name))
    with pytest.raises(InputError) as caught:
        policy_of(None, adapter_name_or_path=str(adapter))
    refused = f"{adapter}: its base {name} is not there, nor beside it; give --model_name_or_path"
    assert (str(caught.value) == refused) == (name != "models/base")
    base = shutil.copytree(bases["untied"], tmp_path / "models" / "base")
    policy_of(None, adapter_name_or_path=str(adapter))
    said = capsys.readouterr().out
    assert re.search(f"^{name} is gone; the base is read from .*/models/.*base$", said, re.M)
    monkeypatch.chdir(tmp_path / "models")
    policy = policy_of(None, adapter_name_or_path="adapter")
    assert os.path.samefile(policy.lora.base_model_name_or_path, base)


# ------------------------------------------------------------------------------ new ChatML markers


def rows(directory, **columns):
    """A data file: one answer to three questions."""
    path = directory / "data.jsonl"
    prompts = ["Why is the sky blue?", "How are you?", "Hello!"]
    path.write_text("".join(json.dumps({"prompt": p, **columns}) + "\n" for p in prompts))
    return [str(path)]


@pytest.fixture(scope="module", params=["tied", "untied", "spare rows", "scaled"])
def unmarked(request, tmp_path_factory):
    """A model whose tokenizer knows no ChatML; without spare rows its embeddings have to grow.
    "Scaled" is Gemma 2, whose embedding multiplies what it reads by the root of its width."""
    directory = tmp_path_factory.mktemp("unmarked")
    tokenizer = make_tokenizer(special=("<|endoftext|>",))
    size = len(tokenizer) + (20 if request.param == "spare rows" else 0)
    torch.manual_seed(0)
    kind = Gemma2Config if request.param == "scaled" else LlamaConfig
    one_table = request.param in ("tied", "scaled")
    config = tiny(kind, vocab_size=size, tie_word_embeddings=one_table)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def marked(unmarked, tmp_path_factory):
    """OUTPUT_DIR of a short SFT run on it, and the policy that the run ended with."""
    folder, runs = tmp_path_factory.mktemp("marked"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "finish", lambda cfg, run: runs.append(run))
        train_sft.run_sft(
            SFTConfig(
                model_name_or_path=unmarked,
                dataset_name=rows(folder, completion="Light is scattered."),
                output_dir=str(folder / "out"),
                max_steps=5,
                learning_rate=1e-2,
                device="cpu",
            )
        )
    return folder / "out", runs[0].policy


def test_new_rows_start_as_the_mean(unmarked):
    plain = AutoModelForCausalLM.from_pretrained(unmarked)
    policy = policy_of(unmarked)
    new = policy.tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    assert new == [300, 301]
    embedding, head = policy.model.get_input_embeddings(), policy.model.get_output_embeddings()
    tables = [(embedding, plain.get_input_embeddings()), (head, plain.get_output_embeddings())]
    for table, before in tables:
        weight, before = table.weight.detach(), before.weight.detach()
        assert torch.equal(weight[:300], before[:300])
        torch.testing.assert_close(weight[new], before.mean(0).expand(2, -1))
    trained = [name for name in trained_tensors(policy.model) if "token_adapter" in name]
    tied = plain.config.tie_word_embeddings
    assert len(trained) == (1 if tied else 2)
    assert (embedding.row_weight is head.row_weight) == tied


def test_new_rows_get_the_gradient_of_a_whole_table(unmarked):
    """As input, as target and as every other word of the softmax, through tied tables as well."""
    prompt, completions = [300, 7, 301], [([40, 301], [True] * 2), ([300, 41, 301], [True] * 3)]
    policy = policy_of(unmarked, disable_dropout=True)
    policy.lm([Example(prompt, completions)]).logps.sum().backward()

    plain = AutoModelForCausalLM.from_pretrained(unmarked)
    plain.resize_token_embeddings(policy.model.vocab_size, mean_resizing=False)
    tables = [
        (plain.get_input_embeddings(), policy.model.get_input_embeddings()),
        (plain.get_output_embeddings(), policy.model.get_output_embeddings()),
    ]
    for table, ours in tables:
        table.weight.data.copy_(ours.weight)
    for completion, _ in completions:
        ids = torch.tensor([prompt + completion])
        logps = plain(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logps.gather(1, ids[0, len(prompt) :, None]).sum().backward()
    for table, ours in tables:
        expected = table.weight.grad[[300, 301]]
        error = torch.linalg.norm(ours.row_weight.grad - expected)
        assert error < 1e-5 * torch.linalg.norm(expected)


def test_new_rows_train_and_peft_restores_them(unmarked, marked, ids):
    out, policy = marked
    plain = AutoModelForCausalLM.from_pretrained(unmarked)
    for table, before in (
        (policy.model.get_input_embeddings(), plain.get_input_embeddings()),
        (policy.model.get_output_embeddings(), plain.get_output_embeddings()),
    ):
        start, end = (table.row_weight - before.weight.mean(0)).detach()
        assert start.abs().max() > 1e-3 and end.abs().max() > 1e-3  # both markers moved
        assert (start - end).abs().max() > 1e-3  # and not together

    ids = torch.cat([ids, torch.tensor([[300, 301, 5], [301, 300, 9]])], dim=1)
    expected = logits_of(peft.AutoPeftModelForCausalLM.from_pretrained(out).eval(), ids)
    again = policy_of(None, adapter_name_or_path=str(out))
    for each in (policy, again):  # as it was in memory when training ended, and read back here
        with generation(each) as ours:
            torch.testing.assert_close(logits_of(ours, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_new_rows_of_a_table_that_trains_whole(whole, unmarked, ids, tmp_path):
    """They learn as part of it; and what is saved opens in PEFT, here, and merged."""
    if AutoConfig.from_pretrained(unmarked).tie_word_embeddings and whole == ["lm_head"]:
        with pytest.raises(InputError, match="tied to the embedding.*; name both or neither"):
            policy_of(unmarked, modules_to_save=whole)
        return
    ids, policy = torch.cat([ids, ids % 2 + 300], dim=1), policy_of(unmarked, modules_to_save=whole)
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    policy.lm([Example([300, 7, 301], [([40, 301], [True] * 2)])]).logps.sum().backward()
    head = policy.model.get_output_embeddings()
    row = head.row_weight.grad[1] if isinstance(head, TokenRows) else head.weight.grad[301]
    assert row.abs().max() > 1e-3
    randomize(trained)
    save_policy(policy, tmp_path / "adapter")
    with generation(policy) as ours:
        expected = logits_of(ours, ids)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(theirs, ids), expected, rtol=1e-5, atol=1e-5)
    merge.main([str(tmp_path / "adapter"), str(tmp_path / "merged"), "--device", "cpu"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(merged, ids), expected, rtol=1e-4, atol=1e-4)
    with generation(policy_of(None, adapter_name_or_path=str(tmp_path / "adapter"))) as again:
        torch.testing.assert_close(logits_of(again, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("whole", [None, ["lm_head"]])
def test_an_adapter_without_rows_for_markers_that_its_base_lacks(whole, unmarked, tmp_path):
    """Their rows would be in no file: the trained adapter could not be opened again."""
    plain = AutoModelForCausalLM.from_pretrained(unmarked)
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=whole, task_type="CAUSAL_LM")
    peft.get_peft_model(plain, lora).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="embed_tokens has no rows for the markers .*native"):
        policy_of(unmarked, adapter_name_or_path=str(tmp_path))


# ---------------------------------------------------------- going on from an adapter: the reference


@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(bias="all", target_modules=["q_proj", "v_proj"]),
        dict(modules_to_save=["lm_head"]),
        dict(target_modules=["q_proj", "lm_head", "embed_tokens"]),
        dict(lora_dropout=0.2, disable_dropout=False),
    ],
    ids=["plain", "all biases", "head", "LoRA on tables", "dropout"],
)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "new"])
def test_the_reference_is_the_adapter_as_it_was(how, trained, bases, tmp_path):
    policy = policy_of(bases["untied"], **how)
    if trained:
        randomize(p for p in policy.model.parameters() if p.requires_grad)
    save_policy(policy, tmp_path)
    continued = policy_of(None, adapter_name_or_path=str(tmp_path))
    assert_reference_stays(continued)


def test_the_reference_with_new_markers(marked):
    assert_reference_stays(policy_of(None, adapter_name_or_path=str(marked[0])))


def assert_reference_stays(policy):
    with torch.no_grad():
        before = policy.lm.eval()(SEQUENCES).logps
    reference = reference_of(DPOConfig(), policy, sigmoid, lambda: SEQUENCES)
    parameters = [p for p in policy.lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    policy.lm.train()
    for _ in range(3):
        (during,) = reference([SEQUENCES])
        torch.testing.assert_close(during, before, rtol=1e-6, atol=1e-5)
        (-policy.lm(SEQUENCES).logps.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert policy.lm.training
    torch.testing.assert_close(reference([SEQUENCES])[0], before, rtol=1e-6, atol=1e-5)
    with torch.no_grad():
        after = policy.lm.eval()(SEQUENCES).logps
    assert ((after - before).abs() > 0.5).all()


def test_dpo_goes_on_from_sft_with_new_markers(marked, tmp_path):
    """The scripts' own road: the adapter of train_sft.py is the start of train_dpo.py."""
    cfg = DPOConfig(
        adapter_name_or_path=str(marked[0]),
        dataset_name=rows(tmp_path, chosen="Light is scattered.", rejected="Bye."),
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
        device="cpu",
    )
    train_dpo.run_dpo(cfg)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-5) and losses[-1] < 0.65
    peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_rows_of_tokens_are_where_their_table_is():
    """On a GPU a CPU's index could not be compared with the ids; meta stands in for one."""
    rows = TokenRows(torch.nn.Embedding(5, 3, device="meta"), [1, 4], None)
    assert rows.rows.is_meta and rows(torch.zeros(1, 2, dtype=torch.long, device="meta")).is_meta


@pytest.mark.parametrize("whole", [[], ["embed_tokens"]])
def test_the_losses_of_float16_are_scaled_whatever_trains(whole, bases):
    """A table that trains whole is in fp32, but computes in float16 as its base does."""
    lm = policy_of(bases["untied"], modules_to_save=whole, dtype="float16").lm
    assert computes_in(lm) == torch.float16


def test_a_head_s_lora_gets_its_gradient_through_the_weight(bases):
    """As through the head itself, which training does not call."""
    policy = policy_of(bases["tied"], target_modules=["q_proj", "lm_head"], lora_dropout=0.0)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    randomize(trained)
    got = torch.autograd.grad(policy.lm(SEQUENCES).logps.sum(), trained)
    with generation(policy) as model:
        expected = torch.autograd.grad(plain_logps(model).sum(), trained)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.linalg.norm(mine - theirs) < 1e-5 * torch.linalg.norm(theirs)


def test_the_mean_logit_is_that_of_the_head_as_it_is(bases):
    """Where LoRA is on the head it changes with each step, in evaluations too."""
    policy = policy_of(bases["untied"], target_modules=["q_proj", "lm_head"])
    with torch.no_grad():
        for seed in range(2):
            randomize((p for p in policy.model.parameters() if p.requires_grad), seed=seed)
            got = policy.lm.eval()(SEQUENCES).logits
            with generation(policy) as model:
                ids = torch.tensor([[60, 3, 9, *range(100, 109)]])
                expected = model(ids).logits[0, 2:-1].mean(-1).sum()
            torch.testing.assert_close(got[-1], expected, rtol=1e-4, atol=1e-4)


def test_tied_tables_that_train_whole_compute_in_the_dtype_of_their_base(bases, ids):
    """Their one weight is in fp32 already when the second table is wrapped."""
    model = AutoModelForCausalLM.from_pretrained(bases["tied"], dtype=torch.bfloat16)
    expected = logits_of(model, ids)
    how = dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    formats_peft.add_adapter(model, formats_peft.LoRAConfig(**how))
    assert torch.equal(logits_of(model, ids), expected)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
