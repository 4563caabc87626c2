"""A GPU computes what the CPU does: log-probs, gradients, whole runs.

Each test compares a device with the CPU, in fp32 without TF32, within a stated bound. Where no GPU
is, the CPU is compared with itself, or with the definition, so that these lines stay alive.
"""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from conftest import make_tokenizer, tiny
from scripts import METHODS, call, metrics
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from nanoalign.fast import attention as fast
from nanoalign.fast import head as fast_head
from nanoalign.logps import Head, token_logps
from nanoalign.model import Policy, generate, make_policy
from nanoalign.nf4 import NF4Linear, dequantize, quantize
from nanoalign.packing import Example, attention, pack
from nanoalign.run.device import compile_layers

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
pytestmark = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
ROUNDING = 1e-4  # of fp32 sums in another order, as a share of the result's norm


@pytest.fixture(autouse=True)
def exact_products():
    torch.set_float32_matmul_precision("highest")


def error(got, expected) -> float:
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    return ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def examples(lengths=((9, [120]), (60, [40, 31]), (5, [33, 2, 17]))) -> list[Example]:
    """331 tokens in a row: more than two blocks of 128, and not a whole number of them."""
    g = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(3, 300, (n,), generator=g).tolist()

    return [Example(ids(n), [(ids(m), [True] * m) for m in replies]) for n, replies in lengths]


# ------------------------------------------------------------------------------ one piece each


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "softcap"])
@pytest.mark.parametrize("window", [None, 40], ids=["", "window"])
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 331])
def test_attention_and_its_gradients(tokens, window, softcap, device):
    """Against the definition, in fp64 on the CPU."""
    batch = examples() if tokens == 331 else [Example([1], [([2] * tokens, [True] * tokens)])]
    g = torch.Generator().manual_seed(1)
    rows = {where: pack(batch, where).geometry for where in ("cpu", device)}
    tokens = len(rows["cpu"].position)
    inputs = [torch.randn(1, heads, tokens, 32, generator=g) for heads in (4, 2, 2)]
    upstream, results = torch.randn(1, 4, tokens, 32, generator=g), []
    for how, where, dtype in (
        (attention, "cpu", torch.float64),
        (fast.attention, device, torch.float32),
    ):
        qkv = [x.to(where, dtype).requires_grad_() for x in inputs]
        out = how(*qkv, rows[where], 0.3, window, softcap)
        results.append((out, *torch.autograd.grad(out, qkv, upstream.to(where, dtype))))
    for expected, got in zip(*results):
        assert error(got, expected) < ROUNDING


@pytest.mark.parametrize("dtype, bound", [(torch.float32, ROUNDING), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("in_steps", [False, True], ids=["quickest", "in steps"])
def test_the_head_at_a_real_vocabulary(in_steps, dtype, bound, device, monkeypatch):
    """128,256 tokens: log_softmax(out=z) goes over them in blocks, and one kernel does them all."""
    if in_steps:

        def in_buffer(h, rows, vocabulary):
            buffer = torch.empty(rows, vocabulary, device=h.device)
            return partial(fast_head.in_buffer, buffer)

        monkeypatch.setattr(fast_head, "way_for", in_buffer)
    g = torch.Generator().manual_seed(0)
    h = torch.randn(21, 32, generator=g).to(dtype)
    weight = torch.randn(128_256, 32, generator=g).to(dtype)
    targets = torch.randint(0, 128_256, (21,), generator=g)
    upstream, results = torch.randn(21, generator=g), []
    for how, where, kind in (
        (token_logps, "cpu", torch.float32),
        (partial(fast_head.token_logps, chunk=8), device, dtype),
    ):
        states = h.to(where, kind).requires_grad_()
        logps = how(states, Head(weight.to(where, kind)), targets.to(where))
        results.append((logps, *torch.autograd.grad(logps, states, upstream.to(where))))
    for expected, got in zip(*results):
        assert error(got, expected) < bound


@pytest.mark.parametrize("double", [False, True], ids=["plain", "doubled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(640, 512), (65, 31)])
def test_nf4_bit_for_bit(size, dtype, double, device):
    """What is quantized on the CPU, decoded; and what is quantized on the device."""
    torch.manual_seed(0)
    linear = nn.Linear(*size, bias=False).to(dtype)
    layer = NF4Linear.from_linear(linear, double_quant=double)
    there = copy.deepcopy(layer).to(device)
    assert torch.equal(there.dequantize().cpu(), layer.dequantize())
    if not double:
        packed, absmax = quantize(linear.weight.detach().flatten())
        again = NF4Linear.from_linear(linear.to(device))
        assert torch.equal(again.packed.cpu(), packed) and torch.equal(again.absmax.cpu(), absmax)
        plain = dequantize(packed, absmax, size[::-1], dtype)
        assert torch.equal(again.dequantize().cpu(), plain)


# ---------------------------------------------------------------------------- log-probs, gradients


SMALL = dict(hidden_size=64, head_dim=16)  # the least that flex_attention takes
KINDS = {
    "llama": tiny(LlamaConfig, **SMALL),
    "gemma2": tiny(
        t.Gemma2Config, sliding_window=40, attn_logit_softcapping=5.0, query_pre_attn_scalar=16,
        final_logit_softcapping=8.0, **SMALL,
    ),
    "qwen2": tiny(t.Qwen2Config, hidden_size=64),  # heads of 8: attention without flex_attention
}  # fmt: skip


def policy_of(kind: str, four_bits: bool, device: str, special=3) -> Policy:
    """With LoRA whose B is not zero. Drawn on the CPU, so that they are the same everywhere."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(KINDS[kind]))
    tokenizer = make_tokenizer(["<|im_start|>", "<|im_end|>", "<|endoftext|>"][-special:])
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()) if four_bits else []:
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(name, NF4Linear.from_linear(module))
    policy = make_policy(model.to(device), tokenizer, r=4, alpha=8)
    g = torch.Generator().manual_seed(1)
    for p in policy.lm.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=g).to(device)
    return policy


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_logps_and_gradients(kind, four_bits, checkpointing, compiled, device):
    if checkpointing and kind != "llama" or compiled and kind == "qwen2":
        pytest.skip("the same for all")
    results = []
    for where in ("cpu", device):
        policy = policy_of(kind, four_bits, where)
        if checkpointing and where == device:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled and where == device:  # on a CPU nothing is by default
            flags = dict(
                torch_compile=None, gradient_checkpointing=checkpointing, sharded=False, plain=False
            )
            compile_layers(SimpleNamespace(**flags), policy.lm)
        policy.lm.train()
        scores = policy(examples())
        scores.logps.sum().backward()
        with torch.no_grad(), policy.reference():
            reference = policy(examples()).logps
        trained = {n: p.grad for n, p in policy.lm.named_parameters() if p.requires_grad}
        results.append({"logps": scores.logps, "reference": reference} | trained)
    expected, got = results
    assert len(expected) > 20
    for name in expected:
        assert error(got[name], expected[name]) < 10 * ROUNDING, name


def test_rows_of_new_markers(device):
    """A tokenizer without the markers: their rows of embedding and head train."""
    results = []
    for where in ("cpu", device):
        policy = policy_of("llama", False, where, special=1)
        start, end = policy.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        batch = [Example([start, 5, end], [([start, 9, end], [True] * 3)])]
        logps = policy(batch).logps
        logps.sum().backward()
        rows = {n: p.grad for n, p in policy.lm.named_parameters() if "token_adapter" in n}
        results.append({"logps": logps} | rows)
    expected, got = results
    assert len(expected) == 3 and expected.keys() == got.keys()  # two tables
    for name in expected:
        assert error(got[name], expected[name]) < 10 * ROUNDING and got[name].any(), name


def test_generation(device):
    """Greedy, of prompts of two lengths."""
    talks = [[{"role": "user", "content": text}] for text in ("Hello!", "Why is the sky blue?")]
    replies = [
        generate(policy_of("llama", False, where), talks, max_new_tokens=12)
        for where in ("cpu", device)
    ]
    assert replies[0] == replies[1] and all(replies[0])


# ---------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(copy.deepcopy(KINDS["llama"])).save_pretrained(home)
    make_tokenizer().save_pretrained(home)
    return str(home)


def a_run(method, out, directory, data, device, **more) -> list[dict]:
    call(method, dict(
        model_name_or_path=directory, dataset_name=data / f"{method}.jsonl", output_dir=out,
        device=device, dtype="float32", tf32=False, lora_r=4, learning_rate=1e-2, logging_steps=1,
        per_device_train_batch_size=4, max_steps=4, disable_dropout=True, **more,
    ))  # fmt: skip
    return metrics(out)


def assert_alike(lines, expected):
    """To 0.1 % in the first step. A step of Adam goes by a gradient's sign, and where that is all
    but zero the rounding decides: to 1 % after it."""
    assert len(lines) == len(expected) > 0
    for line, other in zip(lines, expected):
        assert line.keys() == other.keys()
        bound = 1e-3 if line["step"] == 1 else 1e-2
        for name in other:
            if name == "rewards/accuracies" and line["step"] == 1:
                continue  # policy and reference are equal there but for their rounding
            assert line[name] == pytest.approx(other[name], rel=bound, abs=bound), name


@pytest.mark.parametrize("four_bits", [False, True], ids=["LoRA", "QLoRA"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run(method, four_bits, directory, data, device, tmp_path, no_curves):
    """Every metric of four steps."""
    lines = [
        a_run(method, tmp_path / name, directory, data, where, load_in_4bit=four_bits)
        for name, where in (("one", "cpu"), ("other", device))
    ]
    assert_alike(*lines)


def test_a_run_goes_on(directory, data, device, tmp_path, no_curves):
    whole = a_run("dpo", tmp_path / "whole", directory, data, device, save_steps=2)
    rest = a_run(
        "dpo", tmp_path / "rest", directory, data, device, save_steps=2,
        resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2",
    )  # fmt: skip
    assert_alike(rest, whole[2:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_in_16_bits(dtype, directory, data, device, tmp_path, no_curves):
    """Of a bf16 step with fp32's there is more to say than that it learns: DPO begins at ln 2."""
    call("dpo", dict(
        model_name_or_path=directory, dataset_name=data / "dpo.jsonl", output_dir=tmp_path / "out",
        device=device, dtype=dtype, lora_r=4, learning_rate=1e-2, logging_steps=1,
        per_device_train_batch_size=11, max_steps=8,
    ))  # fmt: skip
    losses = [line["loss"] for line in metrics(tmp_path / "out") if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=0.01) and losses[-1] < 0.6
