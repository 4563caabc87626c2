"""LoRA: the layer, the rows of new tokens and the reference, against the same in plain products."""

import pytest
import torch
from conftest import tiny
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from nanoalign import InputError
from nanoalign.lora import LoRALinear, Reference, TokenRows, add_lora, add_token_rows
from nanoalign.nf4 import NF4Linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_place_is_bit_for_bit_the_sum_of_two_branches(dtype, four_bits, bias):
    """The change is added into what the base layer has just made, and no number shows it."""
    torch.manual_seed(0)
    base = nn.Linear(96, 128, bias=bias).to(dtype).requires_grad_(False)
    layer = LoRALinear(NF4Linear.from_linear(base) if four_bits else base, r=4, scaling=0.5)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(1, 20, 96, dtype=dtype, requires_grad=True)
    upstream = torch.randn(1, 20, 128, dtype=dtype)
    trained = [x, layer.lora_A.weight, layer.lora_B.weight]

    def apart(x):
        a, b = (m.weight.to(dtype) for m in (layer.lora_A, layer.lora_B))
        return torch.addmm(layer.base_layer(x[0]), F.linear(x[0], a), b.T, alpha=0.5)[None]

    def recomputed(x):
        return checkpoint(layer, x, use_reentrant=False)

    results = []
    for way in (apart, layer, recomputed):
        y = way(x)
        results.append((y, *torch.autograd.grad(y, trained, upstream)))
    for got in results[1:]:
        assert all(map(torch.equal, got, results[0]))


def test_a_layer_starts_as_itself():
    """B is zero, and A uniform within 1 / sqrt(in): its largest is near the bound, and its mean
    size half of it, to five sigma of 40,000 numbers."""
    torch.manual_seed(0)
    base, x = nn.Linear(400, 30), torch.randn(5, 400)
    layer = LoRALinear(base, r=100, scaling=2.0)
    assert torch.equal(layer(x), base(x)) and not layer.lora_B.weight.any()
    size = layer.lora_A.weight.detach().abs() * 400**0.5
    assert 0.999 < size.max() <= 1 and abs(size.mean() - 0.5) < 5 * 12**-0.5 / 200


def test_a_layer_merged_and_switched_off():
    """W + scaling B A in fp32, whatever W is in; a table that shares W keeps it."""
    torch.manual_seed(0)
    base, x = nn.Linear(16, 24).bfloat16(), torch.randn(5, 16)
    table, start = nn.Embedding(24, 16, _weight=base.weight), base.weight.detach().clone()
    layer = LoRALinear(base, r=4, scaling=0.5)
    nn.init.normal_(layer.lora_B.weight)
    change = 0.5 * layer.lora_B.weight @ layer.lora_A.weight
    layer.enabled = False
    assert torch.equal(layer(x.bfloat16()), base(x.bfloat16()))
    bias = base.bias.detach().float()
    merged = layer.merge()
    assert merged.weight.dtype == torch.float32 and not merged.weight.requires_grad
    assert torch.equal(merged(x), F.linear(x, merged.weight, bias))
    assert torch.allclose(merged.weight, start.float() + change, rtol=0, atol=1e-6)
    assert torch.equal(table.weight.bfloat16(), start)


def test_lora_is_on_all_linear_layers_but_the_head_and_nothing_else_trains():
    model = LlamaForCausalLM(tiny(LlamaConfig))
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    add_lora(model, r=4, scaling=2.0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{x}.weight" for name in linear for x in "AB"}


# ------------------------------------------------------------------------------------ token rows


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_of_new_tokens_are_those_of_whole_tables(tied):
    """Output, gradient and merge, after the rows have moved, of rows 3 and 7."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny(LlamaConfig, tie_word_embeddings=tied)).requires_grad_(False)
    add_token_rows(model, {"embed_tokens": [3, 7]} | ({} if tied else {"lm_head": [3, 7]}))
    ours = model.get_input_embeddings(), model.get_output_embeddings()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == (1 if tied else 2) and all(p.shape == (2, 32) for p in trained)
    start = [m.base_layer.weight.detach().clone() for m in ours]
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn_like(p))
    wholes = []
    for module, table in zip(ours, start):
        table[[3, 7]] = module.row_weight.detach()
        wholes.append(table.requires_grad_())
    ids, upstream = torch.tensor([[7, 1, 3, 3, 0, 7]]), torch.randn(1, 6, 320)

    def product(embedding, head):  # of a sum that both tables are in
        return ((F.linear(embedding, head)) * upstream).sum()

    got = ours[0](ids)
    assert torch.equal(got, F.embedding(ids, wholes[0]))
    assert torch.equal(ours[1](got), F.linear(got, wholes[1]))
    assert torch.equal(ours[0].weight, wholes[0]) and torch.equal(ours[1].weight, wholes[1])
    product(ours[0](ids), wholes[1].detach()).backward()
    product(F.embedding(ids, wholes[0]), wholes[1].detach()).backward()
    assert torch.allclose(ours[0].row_weight.grad, wholes[0].grad[[3, 7]], rtol=1e-5)
    merged = ours[0].merge()
    assert torch.equal(merged.weight, wholes[0]) and type(merged) is nn.Embedding


def test_a_merged_table_has_its_rows_though_nothing_has_asked_for_it():
    rows = TokenRows(nn.Embedding(5, 3).bfloat16(), [1, 4], None)
    with torch.no_grad():
        rows.row_weight.copy_(torch.arange(6.0).view(2, 3) / 7)
    assert torch.equal(rows.merge().weight[[1, 4]], torch.arange(6.0).view(2, 3) / 7)


def test_a_row_that_a_table_has_not():
    model = LlamaForCausalLM(tiny(LlamaConfig))
    for row, found in ((319, True), (320, False)):
        if found:
            add_token_rows(model, {"embed_tokens": [row]})
            continue
        with pytest.raises(InputError, match=f"lm_head has no row {row}"):
            add_token_rows(model, {"lm_head": [row]})


# ----------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("training", [True, False])
def test_the_reference_is_what_there_was(training):
    """A new LoRA layer, one that is continued, and a bias that trains, under dropout."""
    torch.manual_seed(0)
    new, old = (LoRALinear(nn.Linear(8, 8).requires_grad_(False), 2, 1.0, 0.5) for _ in range(2))
    nn.init.normal_(old.lora_B.weight)
    model = nn.Sequential(new, nn.Dropout(0.5), old, nn.Linear(8, 8))
    model[3].weight.requires_grad_(False)
    x = torch.randn(4, 8)
    start = model.eval()(x).detach()
    reference = Reference(model)
    model.train(training)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    now = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with reference():
            assert torch.equal(model(x), start)
        assert model.training is training and new.enabled and old.enabled
        assert all(map(torch.equal, now, model.parameters()))
