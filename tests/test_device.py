"""What a run settles with its card. Cards are pretended here: what they say is what counts."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from nanoalign import InputError
from nanoalign.fast import attention, flex
from nanoalign.formats.weights import dtype_of, skeleton
from nanoalign.logps import PackedLM
from nanoalign.lora import add_lora
from nanoalign.losses import DPO_LOSSES
from nanoalign.packing import Example, pack
from nanoalign.packing import attention as by_definition
from nanoalign.run import device as run_device
from nanoalign.run import ranks
from nanoalign.run.bytes import Row, sizes_of
from nanoalign.run.device import (
    choose_row_length,
    effective_settings,
    fastest_fit,
    fuses_attention,
    use_tf32,
)
from nanoalign.run.flags import DPOConfig, parse
from nanoalign.run.policy import load_policy
from nanoalign.run.reference import reference_of

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    "asked, stored, capability, device, expected, line",
    [
        ("auto", torch.bfloat16, (7, 5), CUDA, torch.float16, "float16 is used"),
        ("auto", torch.bfloat16, (7, 5), CPU, torch.bfloat16, ""),
        ("auto", torch.bfloat16, (8, 0), CUDA, torch.bfloat16, ""),
        ("auto", torch.float32, (7, 5), CUDA, torch.float32, ""),
        ("auto", None, (9, 0), CUDA, torch.float32, ""),
        ("bfloat16", torch.float32, (7, 5), CUDA, torch.bfloat16, "slowly; --fp16 is for it"),
        ("bfloat16", torch.float32, (8, 0), CUDA, torch.bfloat16, ""),
        ("float16", torch.bfloat16, (7, 5), CUDA, torch.float16, ""),
    ],
)
def test_dtype(asked, stored, capability, device, expected, line, monkeypatch, capsys):
    """As asked, or the checkpoint's; where the card can't multiply bfloat16, one line says so."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert dtype_of(asked, "M", Namespace(dtype=stored), device) == expected
    said = capsys.readouterr().out
    assert line in said and said.count("\n") == bool(line)


def test_heads_too_small_for_a_gpu_s_kernel_take_the_dense_way(monkeypatch):
    """With masks for flex_attention beside the row, and layers that are not compiled around it."""
    g = torch.Generator().manual_seed(0)
    replies = [([n] * 4, [True] * 4) for n in (2, 3)]
    geometry = pack([Example([1] * 5, replies)]).geometry
    flex.plan(geometry, None)
    monkeypatch.setattr(flex, "flex", lambda query, *_: query.new_zeros(()))
    for head, takes_flex in (8, False), (15, False), (16, True):
        q, k, v = (torch.randn(1, 2, 11, head, generator=g) for _ in range(3))
        out = attention.attention(q, k, v, geometry, 1.0)
        assert (out.dim() == 0) is takes_flex
        assert takes_flex or torch.allclose(out, by_definition(q, k, v, geometry, 1.0), atol=1e-5)
    monkeypatch.setattr(flex, "has_flex", lambda device, head: head >= 16)
    for head, takes_flex in (8, False), (16, True):
        with torch.device("meta"):
            model = LlamaForCausalLM(tiny(LlamaConfig, head_dim=head))
        assert fuses_attention(PackedLM(model)) is takes_flex


def test_masks_are_kept_by_bytes(monkeypatch):
    """Those used last, and none that is larger than all that may be kept."""
    made = []
    keep = attention.kept(lambda n: made.append(n) or torch.zeros(n, dtype=torch.bool))
    monkeypatch.setattr(attention, "KEPT", 100)
    for n in (40, 30, 40, 20, 50):  # for 50, 30 goes first and then 40
        assert len(keep(n)) == n
    assert made == [40, 30, 20, 50]
    for n in (50, 20, 101, 20):
        keep(n)
    assert made == [40, 30, 20, 50, 101, 20]  # 101 drives all out, itself too


def test_tf32(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    for tf32 in (True, False):
        for device in (CUDA, CPU):
            use_tf32(Namespace(tf32=tf32), Namespace(device=device, autocast=torch.float32))
    assert asked == ["high", "highest"]
    assert "--tf32 false keeps all 23" in capsys.readouterr().out


@pytest.fixture(scope="module")
def llama_8b():
    """QLoRA of rank 16, as sizes."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    model = skeleton(config, torch.bfloat16)
    add_lora(model, 16, 1.0)
    return replace(sizes_of(model), four_bit=True)


@pytest.mark.parametrize(
    "free, dropout, expected",
    [  # GiB, beside the model; a layer keeps 0.71 GiB of 4,096 tokens, with dropout 0.98
        (130, 0.05, (8192, False)),
        (60, 0.0, (8192, False)),
        (36, 0.05, (4096, False)),
        (17, 0.0, (2048, False)),
        (15, 0.05, (8192, True)),
        (9, 0.0, (8192, True)),
        (0.5, 0.0, (2048, True)),  # it does not fit, and this is the least
    ],
)
def test_rows_and_checkpointing_fit_the_free_memory(free, dropout, expected, llama_8b):
    row = Row(0, dropout=dropout)
    assert fastest_fit(free * 2**30, llama_8b, row, 1000, 10**6) == expected


def test_what_is_given_and_what_examples_are(llama_8b):
    small, lengths = (9 * 2**30, llama_8b, Row(0)), dict(longest=1000, most=10**6)
    assert fastest_fit(*small, **lengths, rows=1024) == (1024, False)
    assert fastest_fit(*small, **lengths, checkpointing=False) == (2048, False)
    assert fastest_fit(2**29, llama_8b, Row(0), **lengths, rows=512, checkpointing=True) == (
        512,
        True,
    )
    assert fastest_fit(*small, longest=500, most=1000) == (8192, False)  # a batch has no more
    assert fastest_fit(17 * 2**30, llama_8b, Row(0), longest=20_000, most=10**6) == (8192, True)


def pretend_a_card(monkeypatch, free):
    """With so many bytes free, and without flex_attention."""
    card = Namespace(total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(flex, "has_flex", lambda *_: False)


@pytest.mark.parametrize("free, checkpointing", [(2**30, False), (2**16, True)])
def test_a_run_settles_its_rows(free, checkpointing, model_dir, monkeypatch, capsys):
    cfg = DPOConfig(model_name_or_path=model_dir, dataset_name=["any"], device="cpu")
    lm = load_policy(cfg).lm
    examples = [Example([1] * 50, [([2] * 300, [True] * 300)] * 2)]
    choose_row_length(cfg, lm, examples)
    assert lm.longest_row is None  # a CPU settles nothing
    monkeypatch.setattr(PackedLM, "device", CUDA)
    pretend_a_card(monkeypatch, free)
    capsys.readouterr()
    choose_row_length(cfg, lm, examples)
    rows = 8192 if free == 2**30 else 2048
    assert lm.longest_row == rows and effective_settings(cfg, lm) == {
        "device": "cuda", "dtype": "float32", "max_row_tokens": rows,
        "gradient_checkpointing": checkpointing, "threads": torch.get_num_threads(),
    }  # fmt: skip
    assert cfg.max_row_tokens is None and cfg.gradient_checkpointing is None  # as they were given
    said = capsys.readouterr().out
    assert f"GiB free: rows of {rows} tokens, with" in said and said.count("\n") == 1
    assert lm.model.get_decoder().layers[0].gradient_checkpointing is checkpointing
    cfg.max_row_tokens, cfg.gradient_checkpointing = 77, checkpointing
    choose_row_length(cfg, lm, examples)
    assert effective_settings(cfg, lm)["max_row_tokens"] == 77 and capsys.readouterr().out == ""


def test_what_else_will_need_memory(model_dir, monkeypatch):
    """Of what is free a tenth is spared. With --fsdp a rank has its part of gradients and AdamW's
    states, and gathers a layer in bfloat16 beside one in float32, and embedding and head with their
    gradients. A reference of its own is as large as the policy."""
    found, model = [], {"model_name_or_path": model_dir, "dataset_name": ["any"], "device": "cpu"}
    monkeypatch.setattr(
        run_device, "fastest_fit", lambda left, *_: found.append(left) or (2048, False)
    )
    pretend_a_card(monkeypatch, 2**30)
    monkeypatch.setattr(ranks, "LAUNCHED", True)
    monkeypatch.setattr(ranks, "WORLD", 2)
    monkeypatch.setattr(ranks, "gather", lambda thing: [thing, thing])
    lm = load_policy(DPOConfig(**model, use_peft=False)).lm
    monkeypatch.setattr(PackedLM, "device", CUDA)
    for more in {}, {"fsdp": True}, {"optim": "paged_adamw_32bit"}, {"ref_model_name_or_path": "M"}:
        cfg = DPOConfig(**model, use_peft=False, **more)
        choose_row_length(cfg, lm, [Example([1], [([2], [True])])])
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in (
        ("all", lm), ("layer", lm.model.model.layers[-1]), ("layers", lm.model.model.layers),
    )}  # fmt: skip
    rest, left, buffers = count["all"] - count["layers"], 0.9 * 2**30, 2 * 4 * 4  # two of 4 numbers
    gathered = 4 * (2.5 * count["layer"] + 2 * rest) + 2 * buffers
    assert found[0] == left - 12 * count["all"]
    assert found[1] == pytest.approx(left - 6 * count["all"] - 0.9 * gathered, abs=4)
    assert found[2] == left - 4 * count["all"]
    assert found[3] == pytest.approx(found[0] - 0.9 * (4 * count["all"] + buffers))


def test_a_reference_of_its_own_is_compiled_as_the_policy_is(model_dir, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compiled.append(module))
    how = dict(model_name_or_path=model_dir, ref_model_name_or_path=model_dir, device="cpu")
    cfg = DPOConfig(dataset_name=["any"], torch_compile=True, **how)
    policy = load_policy(cfg)
    layers = list(policy.model.get_decoder().layers)
    reference_of(cfg, policy, DPO_LOSSES["sigmoid"], list)
    assert compiled[: len(layers)] == layers and len(compiled) == 2 * len(layers)


def test_fsdp_asks_for_a_torch_that_was_tried(model_dir, monkeypatch):
    words = ["--model_name_or_path", model_dir, "--dataset_name", "any", "--fsdp", "true"]
    monkeypatch.setattr(ranks, "LAUNCHED", True)
    monkeypatch.setattr(ranks, "CAN_SHARD", True)
    assert parse(DPOConfig, words, {}).sharded
    monkeypatch.setattr(ranks, "CAN_SHARD", False)
    with pytest.raises(InputError, match="^--fsdp: needs torch 2.13 or a newer one$"):
        parse(DPOConfig, words, {})
