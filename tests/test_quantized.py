"""4-bit models: streamed from files, to bitsandbytes and back, trained on, merged."""

import copy
import json
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, tiny
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

import train_kto
from nanoalign import InputError
from nanoalign.fast import nf4
from nanoalign.formats.bitsandbytes import save_4bit
from nanoalign.formats.files import stored_tensors
from nanoalign.formats.peft import LoRAConfig, add_adapter
from nanoalign.formats.weights import (
    FORMATS,
    NOTE,
    all_weights,
    freeze_linears,
    frozen_layers,
    load_lm,
    skeleton,
)
from nanoalign.lora import LoRALinear
from nanoalign.nf4 import FrozenLinear, NF4Linear
from nanoalign.packing import Example, packed
from nanoalign.run import reference
from nanoalign.run.flags import KTOConfig, SFTConfig, parse
from nanoalign.run.policy import load_policy, save_policy
from nanoalign.tools.merge import main as merge_main
from train_sft import run_sft

CPU = torch.device("cpu")
IDS = torch.arange(3, 43)[None]
BOTH = pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
SMALL = dict(hidden_size=64, intermediate_size=128, head_dim=16)  # rows are multiples of a block


def make(directory, kind=LlamaConfig, dtype=torch.bfloat16, shard="5GB", biases=True, **more):
    """A random model of that kind as a directory."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny(kind, **more)).to(dtype)
    for name, parameter in model.named_parameters():
        if biases and name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(directory, max_shard_size=shard)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


def open_4bit(directory, double=False, dtype="auto"):
    lm = load_lm(str(directory), dtype=dtype, device="cpu", load_in_4bit=True, double_quant=double)
    return lm.model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits.float()


def same_model(a, b):
    """Bit for bit: parameters, packed weights, computed buffers, logits, and what is tied."""
    for kind in ("named_parameters", "named_buffers"):
        mine, other = dict(getattr(a, kind)()), dict(getattr(b, kind)())
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
    assert torch.equal(logits(a), logits(b))


# -------------------------------------------------------------------------------------- streaming

MODELS = {
    "llama tied": dict(tie_word_embeddings=True),
    "llama biases": dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "qwen2": dict(kind=Qwen2Config),
    "gemma2": dict(kind=Gemma2Config, sliding_window=8),
    "gemma3": dict(kind=Gemma3TextConfig, sliding_window=8),  # two rotaries, scaled embeddings
    "llama3 rope": dict(
        rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0,
                             high_freq_factor=4.0, original_max_position_embeddings=64)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_streaming_gives_what_quantizing_a_loaded_model_gives(name, tmp_path):
    directory = make(tmp_path, **MODELS[name])
    streamed = open_4bit(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    freeze_linears(loaded, CPU)
    same_model(streamed, loaded)
    tables = [m.get_output_embeddings().weight is m.get_input_embeddings().weight
              for m in (streamed, loaded)]  # fmt: skip
    assert tables[0] == tables[1]
    assert len(frozen_layers(streamed)) == 14 and not streamed.training
    assert not any(p.requires_grad for p in streamed.parameters())
    assert streamed.generation_config.to_dict() == loaded.generation_config.to_dict()


@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_shards_and_another_dtype(double, dtype, tmp_path):
    directory = make(tmp_path, dtype=torch.float32, shard="20KB", kind=Qwen2Config)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    streamed = open_4bit(directory, double, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    freeze_linears(loaded, CPU, partial(NF4Linear.from_linear, double_quant=double))
    same_model(streamed, loaded)
    assert streamed.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("double, bits", [(False, "4.50"), (True, "4.13")])
def test_says_how_many_bits(double, bits, tmp_path, capsys):
    size = dict(hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=1)
    open_4bit(make(tmp_path, **size), double)
    assert f"7 linear layers in NF4: {bits} bits per parameter\n" in capsys.readouterr().out


def test_says_what_of_a_mixture_is_passed_over(tmp_path, capsys):
    """Attention alone trains; the experts are in 4 bits with it."""
    size = dict(hidden_size=64, head_dim=16, num_local_experts=4)
    name = make(tmp_path, MixtralConfig, **size)
    flags = [f"--model_name_or_path={name}", "--dataset_name=any.jsonl", "--device=cpu"]
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(name).parameters())
    attention, experts = 2 * 3 * 64 * 64, 2 * 4 * 3 * 64 * 64  # k and v have half as many heads
    for in_4bit in ("true", "false"):
        policy = load_policy(parse(SFTConfig, [*flags, f"--load_in_4bit={in_4bit}"], {}))
        said, total = capsys.readouterr().out, all_weights(policy.model)  # with LoRA's
        share = f"{(attention + experts) / base:.0%} of all weights are 32 linear layers in NF4"
        assert (f"{share}: 4.50 bits" in said) == (in_4bit == "true")
        assert f"passes over the experts, {experts / total:.0%} of all weights, and the" in said
        assert "LoRA r=16 on 8 layers" in said
    load_policy(parse(SFTConfig, [*flags, "--use_peft=false"], {}))
    assert "passes over" not in capsys.readouterr().out


def test_tied_tensor_under_its_other_name_or_under_both(tmp_path):
    directory = make(tmp_path, tie_word_embeddings=True)
    expected = logits(open_4bit(directory))
    file = tmp_path / "model.safetensors"
    tensors = {key: t.clone() for key, t in load_file(file).items()}  # the file is written over
    table = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": table}, file, metadata={"format": "pt"})
    model = open_4bit(directory)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(logits(model), expected)
    both = {"lm_head.weight": table, "model.embed_tokens.weight": table.clone()}
    save_file(tensors | both, file, metadata={"format": "pt"})
    assert torch.equal(logits(open_4bit(directory)), expected)
    both["lm_head.weight"] += 1
    save_file(tensors | both, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="lm_head.weight differs"):
        open_4bit(directory)


def test_saved_buffers_of_old_files_are_passed_over(tmp_path):
    directory = make(tmp_path)
    expected, file = logits(open_4bit(directory)), tmp_path / "model.safetensors"
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((4,), torch.nan)}
    save_file(load_file(file) | old, file, metadata={"format": "pt"})
    assert torch.equal(logits(open_4bit(directory)), expected)


def test_skeleton_has_no_weights_and_leaves_torch_alone():
    model = skeleton(tiny(LlamaConfig), torch.bfloat16)
    assert all(p.is_meta for p in model.parameters()) and next(model.buffers()).device == CPU
    assert not torch.nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("kind", ["bin", "experts"])
def test_what_needs_conversion_is_loaded_first(kind, tmp_path, capsys):
    if kind == "bin":
        directory = make(tmp_path)
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    else:  # the file has all experts in one tensor, as transformers' model has them
        directory = make(tmp_path, MixtralConfig, num_local_experts=2, num_experts_per_tok=1)
        model = AutoModelForCausalLM.from_pretrained(directory)
        model.save_pretrained(directory, save_original_format=False)
    model = open_4bit(directory)
    lines = capsys.readouterr().out.splitlines()
    assert "the dense model is loaded first and then quantized" in lines[0]
    assert "4.50 bits per parameter" in lines[1]
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    freeze_linears(loaded, CPU)
    same_model(model, loaded)


def change(file, **tensors):
    """Rewrite a safetensors file with other tensors; None takes one out."""
    new = load_file(file) | tensors
    save_file({k: t for k, t in new.items() if t is not None}, file, metadata={"format": "pt"})


Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({Q: None}, f"no file holds {Q}"),
        ({"model.more": torch.ones(2)}, "model.safetensors: model.more is not in the model"),
        ({Q: torch.ones(32, 16)}, rf"model.safetensors: {Q}: shape \(32, 16\), not \(32, 32\)"),
        ({NORM: torch.ones(3)}, rf"model.safetensors: {NORM}: shape \(3,\), not \(32,\)"),
        ({Q: torch.full((32, 32), torch.nan)}, f"model.safetensors: {Q}: holds NaN"),
        ({NORM: torch.full((32,), torch.inf)}, f"model.safetensors: {NORM} holds NaN or inf"),
    ],
    ids=["missing", "extra", "shape of a linear", "shape", "nan in a linear", "infinity"],
)
def test_wrong_tensors_are_named_with_their_file(tensors, message, tmp_path):
    directory = make(tmp_path)
    change(tmp_path / "model.safetensors", **tensors)
    with pytest.raises(InputError, match=message):
        open_4bit(directory)


def test_wrong_files(tmp_path):
    directory = make(tmp_path, shard="20KB")
    index = tmp_path / "model.safetensors.index.json"
    good, shards = index.read_text(), sorted(tmp_path.glob("*.safetensors"))
    for place in ("../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "..\\x"):
        text = json.loads(good)
        text["weight_map"][NORM] = place
        index.write_text(json.dumps(text))
        with pytest.raises(InputError, match="index.json: .* leads out of the directory"):
            stored_tensors(directory)
    text["weight_map"][NORM] = "gone.safetensors"
    index.write_text(json.dumps(text))
    with pytest.raises(InputError, match="gone.safetensors is not there"):
        stored_tensors(directory)
    home = json.loads(good)["weight_map"][NORM]
    text["weight_map"][NORM] = next(shard.name for shard in shards if shard.name != home)
    index.write_text(json.dumps(text))
    with pytest.raises(InputError, match=f"{NORM} is missing; model.safetensors.index.json says"):
        stored_tensors(directory)
    for broken in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(broken)
        with pytest.raises(InputError, match="index.json: no index"):
            stored_tensors(directory)
    index.write_text(good)
    shards[1].write_bytes(shards[1].read_bytes()[:-5])
    with pytest.raises(InputError, match=f"{shards[1].name}: damaged"):
        stored_tensors(directory)


# ----------------------------------------------------------------------- bitsandbytes, both ways


def peer(directory, dtype, double=None):
    """The model as transformers + bitsandbytes opens it; `double` None: it is in 4 bits already."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=bool(double),
    )
    more = {} if double is None else {"quantization_config": how}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **more)
    return model.train()  # in eval mode its layers repack their weights as they go


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_ours_opens_in_bitsandbytes(double, dtype, kind, tmp_path):
    directory = make(tmp_path / "dense", kind, dtype, tie_word_embeddings=True, **SMALL)
    ours = open_4bit(directory, double)
    save_4bit(ours, tmp_path / "four")
    theirs = peer(tmp_path / "four", dtype)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert theirs.dtype == dtype
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    again = load_lm(str(tmp_path / "four"), device="cpu").model  # and here, without the flag
    same_model(again, ours)


@BOTH
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_theirs_opens_here_without_being_quantized_again(double, shard, tmp_path, monkeypatch):
    directory = make(tmp_path / "dense", Qwen2Config, **SMALL)
    theirs = peer(directory, torch.bfloat16, double)
    theirs.save_pretrained(tmp_path / "four", max_shard_size=shard)
    monkeypatch.setattr(NF4Linear, "pack", None)
    ours = load_lm(str(tmp_path / "four"), device="cpu").model
    assert len(frozen_layers(ours)) == 14
    assert ours.model.layers[0].mlp.up_proj.double_quant is double
    for name, layer in frozen_layers(ours).items():
        assert torch.equal(layer.packed, theirs.get_submodule(name).weight.data.view(-1, 1))
    assert torch.equal(logits(ours), logits(theirs))


@BOTH
def test_merge_writes_a_model_in_4_bits(double, tmp_path, capsys):
    """Without an adapter; bitsandbytes opens it."""
    directory = make(tmp_path / "dense", Qwen2Config, torch.bfloat16, **SMALL)
    make_tokenizer().save_pretrained(directory)
    nested = ["--use_bnb_nested_quant"] * bool(double)
    merge(directory, tmp_path / "four", "--load_in_4bit", *nested)
    assert capsys.readouterr().out.endswith("four, in NF4\n")
    ours = open_4bit(directory, double)
    same_model(load_lm(str(tmp_path / "four"), device="cpu").model, ours)
    theirs = peer(tmp_path / "four", torch.bfloat16)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit):
        merge(directory, tmp_path / "dense-again")  # no adapter, and nothing else to do
    assert "not an adapter directory" in capsys.readouterr().err


def test_wrong_4bit_directories(tmp_path):
    save_4bit(open_4bit(make(tmp_path / "dense")), tmp_path / "four")
    four, config = str(tmp_path / "four"), tmp_path / "four" / "config.json"
    with pytest.raises(InputError, match="4-bit weights can't train; leave out --use_peft false"):
        load_lm(four, device="cpu", train_all=True)
    state = Q + ".absmax"
    change(tmp_path / "four" / "model.safetensors", **{state: None})
    with pytest.raises(InputError, match=f"model.safetensors: {state}: missing"):
        load_lm(four, device="cpu")
    text = json.loads(config.read_text())
    text["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    config.write_text(json.dumps(text))
    with pytest.raises(InputError, match="quantized already, and not by bitsandbytes in NF4"):
        open_4bit(four)
    with pytest.raises(InputError, match="holds no 4-bit layers"):
        save_4bit(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), tmp_path / "x")


# --------------------------------------------------------------------------------------- training


def test_all_linear_is_pefts_all_linear(tmp_path):
    peft = pytest.importorskip("peft")
    directory = make(tmp_path, Qwen2Config, tie_word_embeddings=False, **SMALL)
    theirs = peft.get_peft_model(
        peer(directory, torch.bfloat16, False),
        peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    found = [n.removesuffix(".lora_A.default.weight") for n, _ in theirs.named_parameters()
             if n.endswith("lora_A.default.weight")]  # fmt: skip
    ours = add_adapter(open_4bit(directory), LoRAConfig())
    assert [n.removeprefix("base_model.model.") for n in found] == ours and len(ours) == 14


@BOTH
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_is_that_of_a_dense_model_with_the_same_weights(double, checkpointing, tmp_path):
    cfg = SFTConfig(
        make(tmp_path, Qwen2Config, torch.float32), load_in_4bit=True, device="cpu",
        use_bnb_nested_quant=double, disable_dropout=True, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    policy = load_policy(cfg)
    for layer in [m for m in policy.model.modules() if isinstance(m, LoRALinear)]:
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    dense = copy.deepcopy(policy.lm)
    for name, layer in frozen_layers(dense).items():
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = torch.nn.Parameter(layer.dequantize(), requires_grad=False)
        linear.bias = layer.bias
        dense.set_submodule(name, linear)
    assert not frozen_layers(dense) and len(frozen_layers(policy.lm)) == 14

    ids = IDS[0].tolist()
    batch = [
        Example(ids[:9], [(ids[9:20], [True] * 11), (ids[15:30], [True] * 15)]),
        Example(ids[:5], [(ids[5:9], [True] * 4)]),
    ]
    gradients = []
    for lm in (policy.lm, dense):
        lm.train()
        lm(batch).logps.sum().backward()
        gradients.append({n: p.grad for n, p in lm.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        error = (gradient - gradients[1][name]).norm() / gradients[1][name].norm()
        assert error < 1e-5, name


def test_train_then_merge(tmp_path, capsys):
    """A step of SFT in 4 bits as a user runs it; the merge knows of the 4 bits by itself."""
    data = [{"messages": [{"role": "user", "content": "Why?"},
                          {"role": "assistant", "content": "Light is scattered."}]}]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(data * 8))
    base, adapter = make(tmp_path / "base", Qwen2Config), tmp_path / "adapter"
    flags = (
        f"--model_name_or_path {base} --output_dir {adapter} --dataset_name {tmp_path}/data.json "
        "--load_in_4bit --use_bnb_nested_quant --max_steps 1 --learning_rate 0.05 --device cpu"
    )
    run_sft(parse(SFTConfig, flags.split(), {}))
    assert "14 linear layers in NF4: 4." in capsys.readouterr().out
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 28 and all(t.dtype == torch.float32 for t in tensors.values())
    note = json.loads((adapter / NOTE).read_text())
    assert note == {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                    "dtype": "bfloat16"}  # fmt: skip

    load_policy(SFTConfig(base, adapter_name_or_path=str(adapter), device="cpu"))
    assert "it was trained on a 4-bit base" in capsys.readouterr().out
    merge(adapter, tmp_path / "merged", "--dtype", "float32")
    said = capsys.readouterr().out
    assert "NF4" in said and "largest change of a logit on" in said and "in float32" in said


def test_passes_without_gradient_decode_once(tmp_path, data, no_curves, monkeypatch):
    """KTO's three: the same numbers to the last bit, and each weight decoded three times a step:
    there, forward and backward. Not of rows so short that what is kept would be larger."""
    decodings, once = [], nf4.decoding_once
    dequantize = NF4Linear.dequantize
    monkeypatch.setattr(NF4Linear, "dequantize", lambda s: decodings.append(s) or dequantize(s))
    base, results = make(tmp_path / "base"), []
    flags = f"--model_name_or_path {base} --dataset_name {data / 'kto.jsonl'} --max_steps 2"
    flags += " --load_in_4bit --device cpu --logging_steps 1 --output_dir "
    for way in once, nullcontext, once:
        monkeypatch.setattr(reference, "decoding_once", way)
        more = ["--gradient_checkpointing"] if results[1:] else []
        decodings.clear()
        out = tmp_path / str(len(results))
        train_kto.run_kto(parse(KTOConfig, [*flags.split(), str(out), *more], {}))
        times = decodings.count(decodings[-1])  # decoded for backward, too
        results.append((load_file(out / "adapter_model.safetensors"), times))
    (weights, few), (others, many), (_, recomputed) = results
    assert (few, many, recomputed) == (2 * 3, 2 * 5, 2 * 6)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert nf4.kept is None

    lm = load_policy(SFTConfig(base, load_in_4bit=True, device="cpu")).lm
    layer = next(m for n, m in frozen_layers(lm).items() if "up_proj" in n)
    for tokens, times in (9, 2), (90, 1):  # 64 x 32 weights, 64 + 32 numbers a token
        decodings.clear()
        with torch.no_grad(), once(True):
            first, second = (lm([Example([5], [([7] * tokens, [True] * tokens)])]) for _ in "ab")
        assert torch.equal(first.logps, second.logps)
        assert decodings.count(layer) == times


def test_a_step_moves_only_the_adapter(tmp_path):
    policy = load_policy(SFTConfig(make(tmp_path), load_in_4bit=True, device="cpu", lora_r=2))
    before = {n: t.clone() for n, t in policy.lm.state_dict().items()}
    trained = {n for n, p in policy.lm.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    assert all(policy.lm.get_parameter(n).dtype == torch.float32 for n in trained)
    optimizer = torch.optim.AdamW([policy.lm.get_parameter(n) for n in trained], lr=0.1)
    policy.lm.train()
    example = Example(IDS[0, :9].tolist(), [(IDS[0, 9:30].tolist(), [True] * 21)])
    policy.lm([example]).logps.sum().backward()
    optimizer.step()
    moved = {n for n, t in policy.lm.state_dict().items() if not torch.equal(t, before[n])}
    assert moved <= trained and {n for n in moved if "lora_B" in n} == {
        n for n in trained if "lora_B" in n
    }


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--use_peft", "false", "--load_in_4bit"], "use_peft false and --load_in_4bit contradict"),
        (["--load_in_4bit", "--bnb_4bit_quant_type", "fp4"], "invalid choice: 'fp4'"),
    ],
)
def test_flags_that_contradict(flags, message):
    with pytest.raises(InputError, match=message):
        parse(SFTConfig, ["--model_name_or_path", "m", "--dataset_name", "d", *flags], {})


def test_idle_flag_and_modules_that_cannot_train(tmp_path, capsys):
    flags = ["--model_name_or_path", make(tmp_path), "--dataset_name", "d"]
    parse(SFTConfig, [*flags, "--use_bnb_nested_quant"], {})
    assert "--use_bnb_nested_quant has nothing to do" in capsys.readouterr().out
    cfg = parse(SFTConfig, [*flags, "--load_in_4bit", "--lora_modules_to_save", "q_proj",
                            "--lora_target_modules", "v_proj"], {})  # fmt: skip
    with pytest.raises(InputError, match="--lora_modules_to_save q_proj: is in 4 bits"):
        load_policy(cfg)


# ---------------------------------------------------------------------------------------- merging


def merge(adapter, directory, *flags):
    merge_main([str(adapter), str(directory), "--device", "cpu", *flags])


def greedy(model):
    prompt = IDS[:, :8]
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out.tolist()


def shaken(policy):
    """Every trained tensor moved away from where it starts."""
    torch.manual_seed(2)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return policy


ADAPTERS = [  # flags, tied, in 4 bits
    ({}, True, True),
    ({}, False, False),
    (dict(use_rslora=True, lora_target_modules=["q_proj", "down_proj"]), False, True),
    (dict(lora_bias="all"), True, True),
    (dict(lora_bias="lora_only", lora_target_modules=["q_proj"]), True, False),
    (dict(lora_modules_to_save=["lm_head"]), True, True),
    (dict(lora_modules_to_save=["lm_head", "norm"]), False, True),
]


@pytest.mark.parametrize("flags, tied, four", ADAPTERS)
def test_merge_is_exact(flags, tied, four, tmp_path, capsys):
    base = make(tmp_path / "base", Qwen2Config, torch.bfloat16, tie_word_embeddings=tied)
    cfg = SFTConfig(base, load_in_4bit=four, use_bnb_nested_quant=four, device="cpu", **flags)
    policy = shaken(load_policy(cfg))
    save_policy(policy, tmp_path / "adapter")
    assert (tmp_path / "adapter" / NOTE).exists() is four

    merge(tmp_path / "adapter", tmp_path / "fp32", "--dtype", "float32")
    said = capsys.readouterr().out
    assert float(said.split("sample tokens: ")[1].split(";")[0]) < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32")
    assert merged.dtype == torch.float32 and not frozen_layers(merged)
    # the unmerged model, computing in fp32 with the very weights it was trained on
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.float()
    for module in policy.model.modules():
        if type(module).__name__ == "TrainedModule":
            module.dtype = torch.float32
    policy.model.eval().set_attn_implementation(policy.attention)
    torch.testing.assert_close(logits(merged), logits(policy.model), rtol=1e-4, atol=1e-4)
    assert greedy(merged) == greedy(policy.model)

    merge(tmp_path / "adapter", tmp_path / "bf16")
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert rounded.dtype == torch.bfloat16
    for key, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[key].bfloat16()), key


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merge_with_new_tokens(tied, tmp_path):
    """The base lacks the ChatML markers: their rows are trained, and merged."""
    base = make(tmp_path / "base", vocab_size=300, tie_word_embeddings=tied)
    make_tokenizer(special=("<|endoftext|>",)).save_pretrained(base)
    policy = shaken(load_policy(SFTConfig(base, load_in_4bit=True, device="cpu")))
    save_policy(policy, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", "--dtype", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    markers = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    table = policy.model.get_input_embeddings()
    assert torch.equal(merged.get_input_embeddings().weight[markers], table.row_weight)
    head = policy.model.get_output_embeddings()
    assert torch.equal(merged.get_output_embeddings().weight[markers], head.row_weight)
    assert len(merged.get_input_embeddings().weight) == len(table.weight)


def test_a_server_reads_template_and_end_of_a_merged_model(tmp_path):
    """What docs/serve.md says of the directory, of llama.cpp's library, and of its Modelfile."""
    gguf = pytest.importorskip("gguf")
    base = make(tmp_path / "base", vocab_size=300)
    make_tokenizer(special=("<|endoftext|>",)).save_pretrained(base)  # another end than ChatML's
    save_policy(load_policy(SFTConfig(base, device="cpu")), tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == end
    for name in ("config", "generation_config"):
        found = json.loads((tmp_path / "merged" / f"{name}.json").read_text())["eos_token_id"]
        assert found in (end, [end])
    read = gguf.SpecialVocab(tmp_path / "merged")  # what the converter writes into a file
    assert read.special_token_ids["eos"] == end and read.chat_template == tokenizer.chat_template

    own = (tmp_path / "merged" / "Modelfile").read_text(encoding="utf-8")
    page = Path(__file__).parent.parent / "docs" / "serve.md"
    assert f"```\n{own}```" in page.read_text(encoding="utf-8")
    assert re.findall("^PARAMETER (.*)", own, flags=re.M) == [f'stop "{tokenizer.eos_token}"']
    template = re.search('TEMPLATE """(.*?)"""', own, flags=re.S)[1]
    loop, rest = template.removeprefix("{{ range .Messages }}").split("{{ end }}")
    talk = [("system", "Be brief."), ("user", "Hi."), ("assistant", "Yes?"), ("user", "Bye.")]
    turns = [loop.replace("{{ .Role }}", r).replace("{{ .Content }}", c) for r, c in talk]
    messages = [dict(role=role, content=content) for role, content in talk]
    ours = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "".join(turns) + rest == ours


def test_the_modelfile_of_a_model_with_a_template_of_its_own(tmp_path):
    """Its stop token is said; a template that can't be written in Go's language is not."""
    base = make(tmp_path / "base", vocab_size=300)
    tokenizer = make_tokenizer(special=("<|endoftext|>", "<|end|>"))
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer.save_pretrained(base)
    save_policy(load_policy(SFTConfig(base, device="cpu")), tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    lines = (tmp_path / "merged" / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "FROM .",
        'PARAMETER stop "<|end|>"',
    ]
    assert any(line.startswith("#") and "TEMPLATE" in line for line in lines)


def test_peft_does_not_mind_the_note_and_gets_the_same_logits(tmp_path):
    peft = pytest.importorskip("peft")
    base = make(tmp_path / "base", dtype=torch.float32, **SMALL)
    policy = shaken(load_policy(SFTConfig(base, load_in_4bit=True, device="cpu")))
    save_policy(policy, tmp_path / "adapter")
    theirs = peer(base, torch.float32, False)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").train()  # see peer
    policy.model.eval().set_attn_implementation(policy.attention)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(logits(theirs), logits(policy.model), rtol=1e-4, atol=1e-4)


def test_merge_without_a_note(tmp_path):
    """An adapter of another tool: the flag says 4 bits, and --no-load_in_4bit overrules a note."""
    base = make(tmp_path / "base")
    policy = shaken(load_policy(SFTConfig(base, load_in_4bit=True, device="cpu")))
    save_policy(policy, tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    merge(adapter, tmp_path / "a")
    merge(adapter, tmp_path / "b", "--no-load_in_4bit")
    (tmp_path / "adapter" / NOTE).unlink()
    merge(adapter, tmp_path / "c")
    merge(adapter, tmp_path / "d", "--load_in_4bit")
    a, b, c, d = (load_file(tmp_path / x / "model.safetensors")[Q] for x in "abcd")
    assert torch.equal(a, d) and torch.equal(b, c) and not torch.equal(a, b)


def test_merge_errors_are_one_line(tmp_path, capsys):
    base = make(tmp_path / "base")
    policy = load_policy(SFTConfig(base, load_in_4bit=True, device="cpu"))
    save_policy(policy, tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    capsys.readouterr()

    def fails(*arguments):
        with pytest.raises(SystemExit) as exit:
            merge_main(list(map(str, arguments)))
        assert exit.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("nanoalign.merge: error: ")
        return error

    assert "not an adapter directory" in fails(base, tmp_path / "out")
    assert "not empty" in fails(adapter, tmp_path / "full")
    assert "required: directory" in fails(adapter)
    assert "invalid choice: 'int8'" in fails(adapter, tmp_path / "out", "--dtype", "int8")
    assert "not there" in fails(
        adapter, tmp_path / "o", "--model_name_or_path", tmp_path / "not there"
    )
    (tmp_path / "adapter" / NOTE).write_text("{}")
    assert NOTE in fails(adapter, tmp_path / "out")


# ---------------------------------------------------------------------------- a format of your own


class Int8Linear(FrozenLinear):
    """Eight bits: a row is divided by its absmax and rounded to steps of 1 / 127."""

    def pack(self, weight):
        weight = weight.float()
        self.register_buffer("absmax", weight.abs().amax(1, keepdim=True))  # (out, 1)
        steps = 127 * weight / self.absmax.clamp(min=1e-38)
        self.register_buffer("codes", steps.round().to(torch.int8))  # (out, in)

    def dequantize(self):
        return (self.codes * (self.absmax / 127)).to(self.dtype)


def test_another_format_is_one_class_and_one_line(tmp_path, monkeypatch, capsys):
    """Trained by its name in the table, named in the note, merged with the very weights trained."""
    monkeypatch.setitem(FORMATS, "int8", Int8Linear)
    data = [{"messages": [{"role": "user", "content": "Why?"},
                          {"role": "assistant", "content": "Light is scattered."}]}]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(data * 8))
    base, adapter = make(tmp_path / "base", Qwen2Config, torch.float32), tmp_path / "adapter"
    flags = (
        f"--model_name_or_path {base} --output_dir {adapter} --dataset_name {tmp_path}/data.json "
        "--load_in_4bit --bnb_4bit_quant_type int8 --max_steps 2 --learning_rate 0.05 --device cpu"
    )
    policy = run_sft(parse(SFTConfig, flags.split(), {})).policy
    assert "14 linear layers in INT8: 8." in capsys.readouterr().out
    layers = frozen_layers(policy.model)
    assert len(layers) == 14 and {type(layer) for layer in layers.values()} == {Int8Linear}
    assert json.loads((adapter / NOTE).read_text())["bnb_4bit_quant_type"] == "int8"

    ids = IDS[0].tolist()
    batch = [Example(ids[:9], [(ids[9:20], [True] * 11), (ids[15:30], [True] * 15)])]

    @torch.no_grad()
    def logps_of_merged(name, *flags):
        merge(adapter, tmp_path / name, *flags)
        lm = load_lm(str(tmp_path / name), device="cpu").eval()
        lm.model.set_attn_implementation(packed())
        return lm(batch).logps

    trained = policy.lm.eval()(batch).logps.detach()
    torch.testing.assert_close(logps_of_merged("merged"), trained, rtol=1e-6, atol=1e-5)
    named = logps_of_merged("named", "--load_in_4bit", "--bnb_4bit_quant_type", "int8")
    torch.testing.assert_close(named, trained, rtol=1e-6, atol=1e-5)
    for wrong in "--no-load_in_4bit", "--load_in_4bit":  # in full; in NF4: other weights
        assert (logps_of_merged(wrong, wrong) - trained).abs().max() > 1e-3


def test_a_note_of_an_unknown_format_is_refused(tmp_path, monkeypatch, capsys):
    base, adapter = make(tmp_path / "base"), tmp_path / "adapter"
    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, "int8", Int8Linear)
        cfg = SFTConfig(base, load_in_4bit=True, bnb_4bit_quant_type="int8", device="cpu")
        save_policy(load_policy(cfg), adapter)
    with pytest.raises(SystemExit):
        merge(adapter, tmp_path / "merged")
    assert re.search(f"{NOTE}.*int8", capsys.readouterr().err)


def test_doubled_scales_of_a_format_without_are_refused(tmp_path, monkeypatch):
    """Before the model is read, in one line; and FrozenLinear itself knows nothing of them."""
    monkeypatch.setitem(FORMATS, "int8", Int8Linear)
    asked = {"load_in_4bit": True, "quant_type": "int8", "double_quant": True}
    with pytest.raises(InputError, match="^--use_bnb_nested_quant: int8 does not quantize its"):
        load_lm("nowhere", **asked)
    assert "double_quant" not in vars(Int8Linear.from_linear(torch.nn.Linear(2, 2)))


def test_an_adapter_goes_on_with_the_base_of_its_note(tmp_path, monkeypatch):
    """--load_in_4bit takes the note's format; a flag that asks for another one is refused."""
    monkeypatch.setitem(FORMATS, "int8", Int8Linear)
    base = make(tmp_path / "base")

    def opened(adapter, **flags):
        cfg = {"load_in_4bit": True, "device": "cpu", **flags}
        return load_policy(SFTConfig(base, adapter_name_or_path=adapter, **cfg))

    def trained(directory, **flags):
        save_policy(opened(None, **flags), tmp_path / directory)
        return str(tmp_path / directory)

    eight = trained("int8", bnb_4bit_quant_type="int8")
    nested, plain = trained("nested", use_bnb_nested_quant=True), trained("plain")
    for flags in {}, {"bnb_4bit_quant_type": "int8"}:
        layers = frozen_layers(opened(eight, **flags).model).values()
        assert len(layers) == 14 and {type(layer) for layer in layers} == {Int8Linear}
    for adapter, double in (nested, True), (plain, False):
        layers = frozen_layers(opened(adapter).model).values()
        assert len(layers) == 14 and {layer.double_quant for layer in layers} == {double}
    for adapter, flag, value in (
        (plain, "use_bnb_nested_quant", True),
        (eight, "use_bnb_nested_quant", True),
        (nested, "bnb_4bit_quant_type", "int8"),
    ):
        with pytest.raises(InputError, match=f"^{adapter}: trained on another base than the flags"):
            opened(adapter, **{flag: value})
        assert not frozen_layers(opened(adapter, load_in_4bit=False, **{flag: value}).model)


def test_a_move_of_dtype_leaves_the_scales_of_any_format():
    linear = torch.nn.Linear(64, 32)
    layer = Int8Linear.from_linear(linear)
    before = layer.absmax.clone()
    layer.bfloat16()
    assert torch.equal(layer.absmax, before) and layer.bias.dtype == torch.bfloat16
    error = (layer.dequantize().float() - linear.weight).abs().amax(1)
    assert (error <= before[:, 0] / 127 * 0.5 + 1e-6).all()
