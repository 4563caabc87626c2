"""A decoder layer as a GPU gets it, one graph: traced here on the CPU, its kernels torch's own.

What a compiler would make of a graph is not tested, only that there is one, that it serves all
rows, and that its numbers are those of the plain way.
"""

import contextlib
import random
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from conftest import Kept, tiny
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig

from nanoalign import nf4
from nanoalign.chatml import ChatML
from nanoalign.fast import flex as gpu
from nanoalign.formats.weights import freeze_linears
from nanoalign.logps import PackedLM
from nanoalign.lora import LoRALinear, add_lora
from nanoalign.model import Policy, open_template, sample
from nanoalign.packing import Example, attention, pack, packed
from nanoalign.run.bytes import Row, kept_in_a_layer, sizes_of
from nanoalign.run.device import compile_layers
from nanoalign.run.flags import SFTConfig, parse

CPU = torch.device("cpu")


def random_row(r, examples=6, tokens=60):
    """Prompts, some of them empty, with one to three completions each."""

    def ids(least):
        return [r.randrange(3, 300) for _ in range(r.randint(least, tokens))]

    def completion():
        new = ids(1)
        return new, [True] * len(new)

    row = [
        Example(ids(0), [completion() for _ in range(r.randint(1, 3))])
        for _ in range(r.randint(1, examples))
    ]
    return [*row, Example(ids(1), [completion()])]  # one predicts something for sure


# ------------------------------------------------------------------- the mask and the predicate


def listed(counts, indices):
    """(blocks, blocks) bool from flex_attention's lists."""
    dense = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, n, columns in zip(dense, counts[0, 0], indices[0, 0]):
        row[columns[:n].long()] = True
    return dense


def in_blocks(allowed):
    """(T, T) -> in which 128 x 128 blocks is something allowed, and in which everything."""
    missing = -len(allowed) % 128
    blocks = torch.nn.functional.pad(allowed, (0, missing, 0, missing))
    blocks = blocks.view(-(-len(allowed) // 128), 128, -1, 128)
    return blocks.any(3).any(1), blocks.all(3).all(1)


@pytest.mark.parametrize("window", [None, 1, 30, 200])
def test_predicate_and_block_mask_are_those_of_the_definition(window):
    r = random.Random(0)
    for tokens in (3, 40, 150, 300):
        for _ in range(4):
            geometry = pack(random_row(r, 5, tokens)).geometry
            index = torch.arange(len(geometry.position))
            allowed = geometry.allowed(index[:, None], index[None], window)
            mask, _ = gpu.plan(geometry, window)
            assert torch.equal(mask.mask_mod(0, 0, index[:, None], index[None]), allowed)
            mixed = listed(mask.kv_num_blocks, mask.kv_indices)
            full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
            some, every = in_blocks(allowed)
            assert torch.equal(full, every) and not (mixed & full).any()
            assert not (some & ~(mixed | full)).any()  # nobody is passed over
            if window is None:
                assert torch.equal(mixed | full, some)  # and nothing looked at in vain


def test_no_mask_of_a_long_row_is_made_token_by_token():
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.bytes = max(self.bytes, *(t.nbytes for t in tensors), 0)
            return out

    replies = [([first] * 1001, [True] * 1001) for first in (2, 3)]
    geometry = pack([Example([1] * 1000, replies)] * 11).geometry
    tokens = len(geometry.position)
    assert tokens == 33_000
    with Largest() as largest:
        gpu.plan(geometry, 512)
    assert largest.bytes <= 16 * tokens + 8 * (tokens // 128 + 1) ** 2  # T^2 would be 10^9


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["", "softcap"])
@pytest.mark.parametrize("window", [None, 20], ids=["", "window"])
def test_flex_and_its_gradients_are_the_definition(window, softcap, traced):
    """In float64, at lengths of which 128 is no divisor; two query heads share a key."""
    r, g = random.Random(1), torch.Generator().manual_seed(0)
    for tokens in (9, 60):
        geometry = pack(random_row(r, 4, tokens)).geometry
        shapes = [(1, heads, len(geometry.position), 16) for heads in (4, 2, 2)]
        inputs = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
        weight = torch.randn(shapes[0], generator=g, dtype=torch.float64)
        results = []
        for way in gpu.flex, attention:
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = way(*leaves, geometry, 0.3, window, softcap)
            results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
        for got, expected in zip(*results):
            assert torch.allclose(got, expected, atol=1e-10)


def test_where_flex_is_and_what_it_is_told_of_a_small_card(monkeypatch):
    """Cards of before 2020, and those without triton, take the dense way; on one with 99 KiB of
    shared memory a block has less of it, and less still in fp32."""
    card = torch.device("cuda", 0)
    for capability, triton, there in [((7, 5), 1, False), ((8, 0), 0, False), ((8, 0), 1, True)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: triton or None)
        assert gpu.has_flex.__wrapped__(card) is there
        assert not gpu.has_flex.__wrapped__(card, 15)  # triton multiplies no smaller blocks than 16
    assert not gpu.has_flex(CPU) and not gpu.little_shared_memory(CPU)
    for kib, little in (99, True), (163, False), (227, False):
        card_has = SimpleNamespace(shared_memory_per_block_optin=kib * 1024)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card_has)
        assert gpu.little_shared_memory.__wrapped__(card) is little

    def options(width, dtype, little=True):
        return gpu.kernel_options(torch.zeros(1, 1, 1, width, dtype=dtype), little)

    # a block without a key that a query sees may come first: NaN without flex_attention's guard
    ordinary = options(256, torch.float32, little=False)
    assert "ROWS_GUARANTEED_SAFE" not in ordinary
    llama, gemma = (options(width, torch.bfloat16) for width in (128, 256))
    assert "fwd_num_stages" not in ordinary and llama == ordinary | {"fwd_num_stages": 2}
    assert gemma["bwd_BLOCK_M1"] == gemma["bwd_BLOCK_N2"] == 32 and gemma["bwd_num_stages"] == 2
    for width, keys in (64, 32), (128, 32), (256, 16):  # these blocks fit: compiled for such cards
        exact = {"fwd_num_stages": 2, "fwd_BLOCK_M": 32, "fwd_BLOCK_N": keys}
        assert options(width, torch.float32) == ordinary | exact


# ------------------------------------------------------------------------------------- one graph


def as_traced(graph, inputs):
    """Run a graph's operations one by one. aot_eager traces backward too, which takes longer."""
    return graph.forward


@pytest.fixture
def traced(monkeypatch, request):
    """As on a GPU, but torch.compile only traces; -> the graphs, as numbers of their operations.
    A layer that is not one graph is an error."""
    graphs, compile = [], torch.compile
    run = getattr(request, "param", aot_eager)

    def backend(graph, inputs):
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return run(graph, inputs)

    def trace(function, **how):
        return compile(function, dynamic=True, fullgraph=True, backend=backend)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", trace)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(gpu, "has_flex", lambda device, head=16: head >= 16)
    monkeypatch.setattr(gpu, "compiled_flex", gpu.compiled_flex.__wrapped__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield graphs
    torch.compiler.reset()


HEADS = dict(head_dim=16)  # the least that flex_attention takes
KINDS = {
    "llama": tiny(LlamaConfig, **HEADS),
    "mistral": tiny(MistralConfig, sliding_window=40, **HEADS),
    "gemma2": tiny(
        Gemma2Config,
        sliding_window=40,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=20.0,
        **HEADS,
    ),
}


def a_model(kind, dtype=torch.float32, four_bits=False):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind], dtype=dtype).requires_grad_(False)
    if four_bits:
        freeze_linears(model, CPU)
    add_lora(model, r=4, scaling=2.0)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B.weight, std=0.1)
    model.set_attn_implementation(packed())
    return PackedLM(model, softcap=model.config.to_dict().get("final_logit_softcapping")).train()


def scores_and_gradients(lm, examples):
    lm.zero_grad()
    logps = lm(examples).logps
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return [logps.detach(), *(p.grad for p in lm.parameters() if p.requires_grad)]


def compiled(lm, checkpointing=False, torch_compile=None):
    if checkpointing:
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    cfg = SimpleNamespace(
        torch_compile=torch_compile,
        gradient_checkpointing=checkpointing,
        sharded=False,
        plain=False,
    )
    compile_layers(cfg, lm)


@pytest.mark.parametrize(
    "kind, four_bits, checkpointing, rows, most",
    [
        ("llama", False, False, 60, 4),
        ("llama", True, True, 6, 4),
        ("mistral", True, False, 6, 4),
        ("gemma2", False, True, 6, 8),
    ],
)
def test_a_layer_is_one_graph_for_all_rows(
    kind, four_bits, checkpointing, rows, most, traced, monkeypatch
):
    """The same numbers, and after a few compilations no others, whatever is in a row: one where
    no gradient comes in and one where it does, each for rows of one block and of more. Gemma 2's
    layers are of two kinds."""
    r, lm = random.Random(2), a_model(kind, four_bits=four_bits)
    batches = [random_row(r, 3, 40) for _ in range(rows)]
    with monkeypatch.context() as plainly:
        plainly.setattr(gpu, "has_flex", lambda *_: False)
        expected = [scores_and_gradients(lm, batch) for batch in batches[:6]]
    compiled(lm, checkpointing)
    for i, batch in enumerate(batches):
        got = scores_and_gradients(lm, batch)
        for a, b in zip(got, expected[i] if i < 6 else ()):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max())
    assert 0 < len(traced) <= most, traced


@pytest.mark.parametrize("traced", [as_traced], indirect=True, ids=[""])
def test_reference_and_generation(traced, tokenizer):
    """The reference is the same layers without LoRA: graphs of their own. A text is generated
    without a graph, and the layers are compiled ones again when it is done."""
    r, lm = random.Random(3), a_model("llama")
    lm.model.set_attn_implementation("sdpa")  # what a text is generated with
    policy = Policy(lm, tokenizer, open_template(tokenizer, ChatML)[0])
    compiled(lm)
    batches = [random_row(r, 3, 40) for _ in range(3)]
    for batch in batches:
        scores_and_gradients(lm, batch)
    with torch.no_grad(), policy.reference():
        scores = [lm(batch).logps for batch in batches]
    with_reference = len(traced)
    assert with_reference <= 8
    before = [layer._compiled_call_impl for layer in lm.model.get_decoder().layers]
    assert len(sample(policy, [[5, 6, 7], [8]], max_new_tokens=4)) == 2
    assert [layer._compiled_call_impl for layer in lm.model.get_decoder().layers] == before
    with torch.no_grad(), policy.reference():
        assert all(torch.equal(lm(b).logps, old) for b, old in zip(batches, scores))
    assert len(traced) == with_reference


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("four_bits", [False, True], ids=["", "4bit"])
def test_what_one_graph_keeps_for_backward(four_bits, dropout, traced, monkeypatch):
    """Cut by the compiler's own rules, it is what bytes.py counts: a quarter less than without a
    compiler, since norms, rotations and activations are computed anew; of 4 bits nothing dense."""
    wide = dict(hidden_size=128, intermediate_size=448, num_attention_heads=4, head_dim=32)
    config = tiny(LlamaConfig, num_hidden_layers=1, num_key_value_heads=1, **wide)
    monkeypatch.setitem(KINDS, "wide", config)
    lm = a_model("wide", torch.bfloat16, four_bits)
    for module in lm.modules():
        if isinstance(module, LoRALinear):
            module.dropout = torch.nn.Dropout(dropout)
    row = pack(random_row(random.Random(4), 4, 100))
    tokens, decoder = len(row.input_ids), lm.model.get_decoder()
    stream = torch.randn(1, tokens, 128, dtype=torch.bfloat16, requires_grad=True)
    rotary = decoder.rotary_emb(stream, row.geometry.position[None])

    def plain(graph, inputs):
        return make_boxed_func(graph.forward)

    layer = torch._dynamo.optimize(
        aot_autograd(
            fw_compiler=plain,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        ),
        dynamic=True,
        nopython=True,
    )(decoder.layers[0])
    given = dict(position_embeddings=rotary, geometry=row.geometry)
    layer(stream, **given)  # compiled now
    kept = Kept([*lm.parameters(), *lm.buffers(), *rotary])
    with kept:
        layer(stream, **given)
    row, sizes = Row(tokens, dropout=dropout, compiled=True), sizes_of(lm.model)
    casts = 2 * sizes.adapters + tokens * 4  # A and B in bfloat16; and the norm's one number
    copied = tokens * sizes.query * 2  # on a GPU attention's output lies as the next layer reads it
    counted = tokens * sum(kept_in_a_layer(sizes, row).values())
    assert kept.bytes - casts - copied == pytest.approx(counted, rel=0.05)
    if not dropout:
        eager = tokens * sum(kept_in_a_layer(sizes, replace(row, compiled=False)).values())
        assert kept.bytes - casts - copied < 0.77 * eager


def test_nobody_waits_for_the_device_before_a_step_is_done(monkeypatch):
    """On the device "meta" there are no numbers, so whoever asks for one fails; and what goes there
    goes without waiting."""

    class Copies(TorchDispatchMode):
        seen, waited = 0, []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if (
                "copy" in str(function)
                and torch.device(kwargs.get("device") or "cpu").type == "meta"
            ):
                self.seen += 1
                if not kwargs.get("non_blocking"):
                    self.waited.append(function)
            return function(*args, **kwargs)

    monkeypatch.setattr(torch, "autocast", lambda *how, **more: contextlib.nullcontext())
    nf4.tables(torch.device("meta"))  # copied there once, when the first layer asks for them
    lm, r = a_model("llama", four_bits=True), random.Random(5)
    lm.to("meta")
    with Copies() as copies:
        scores = lm(random_row(r), neftune_alpha=5.0)
        some = scores.take([0, len(scores.tokens) - 1])
        (some.logps / some.lengths).sum().backward()
    assert copies.seen == 5 and not copies.waited


# --------------------------------------------------------------------------------------- the flag


def test_torch_compile_is_on_where_a_layer_becomes_one_graph(monkeypatch, capsys):
    data = ["--dataset_name", "x.jsonl", "--model_name_or_path", "m"]

    def flag(*words):
        return parse(SFTConfig, [*data, *words], {}).torch_compile

    assert flag() is None and flag("--torch_compile") and flag("--torch_compile", "true")
    assert flag("--torch_compile", "false") is False

    def compiles(there, torch_compile, checkpointing=False):
        lm = a_model("llama")
        monkeypatch.setattr(gpu, "has_flex", lambda *_: there)
        compiled(lm, checkpointing, torch_compile)
        made = {layer._compiled_call_impl is not None for layer in lm.model.get_decoder().layers}
        return (*made, capsys.readouterr().out.partition(":")[0].partition(" beside")[0].strip())

    idle = "--torch_compile has nothing to do"
    assert compiles(True, None) == compiles(True, None, True) == (True, "compiles the layers")
    assert compiles(False, None) == compiles(True, False) == (False, "")
    assert compiles(True, True) == compiles(False, True) == (True, "")
    assert compiles(False, True, True) == (False, idle)
