"""What fits where: the counts against what autograd keeps and what tensors really hold."""

import weakref
from pathlib import Path

import pytest
import torch
import transformers as t
from conftest import Kept, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanoalign.fast import paged
from nanoalign.formats.weights import all_weights, freeze_linears, skeleton
from nanoalign.logps import PackedLM
from nanoalign.lora import add_lora
from nanoalign.packing import Example, pack, packed
from nanoalign.run.bytes import Row, kept_in_a_layer, row_bytes, sizes_of, standing_bytes
from nanoalign.tools import memory


class Alive(TorchDispatchMode):
    """The bytes of all tensors that were made and not freed: now, and at their most."""

    def __init__(self, before=()):
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in before}
        self.now = self.peak = 0

    def note(self, storage):
        place, size = storage._cdata, storage.nbytes()
        if place in self.seen:
            return

        def freed():
            self.now -= size
            self.seen.remove(place)

        weakref.finalize(storage, freed)
        self.seen.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return out


def make(kind=t.LlamaConfig, how="lora", dtype=torch.bfloat16, dropout=0.0, **size):
    """A model with random weights: LoRA on a dense or 4-bit base, or all of it trains."""
    config = tiny(kind, **size)
    config._attn_implementation = packed()
    model = t.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if how == "qlora":
        freeze_linears(model, "cpu")
    if how != "full":
        add_lora(model, 8, 1.0, dropout)
    return model.train()


def examples(lengths, vocabulary):
    """Random ones, which stand in a row with so many tokens: the last one does not."""
    ids = [torch.randint(vocabulary, (n + 1,)).tolist() for n in lengths]
    return [Example(i[:9], [(i[9:], [True] * len(i[9:]))]) for i in ids]


WIDE = dict(hidden_size=128, intermediate_size=352, num_attention_heads=4, num_key_value_heads=2)
WIDE |= dict(head_dim=16, num_hidden_layers=1, attn_logit_softcapping=None)


@pytest.mark.parametrize("kind", (t.LlamaConfig, t.Qwen3Config, t.Gemma2Config))
@pytest.mark.parametrize("how", ("lora", "qlora", "dropout", "fp32", "full", "autocast"))
def test_what_autograd_keeps_of_a_layer(kind, how):
    """What the hooks see of a row of two examples is the list in bytes.py, to 2 %."""
    train_all, fp32 = how in ("full", "autocast"), how in ("fp32", "full")
    dtype = torch.float32 if train_all or fp32 else torch.bfloat16
    dropout = 0.5 if how == "dropout" else 0.0
    model = make(kind, "full" if train_all else how, dtype, dropout, **WIDE)
    row = pack(examples([128, 128], 320))
    stream = torch.randn(1, 256, 128, dtype=dtype, requires_grad=True)
    decoder, position = model.get_decoder(), row.geometry.position[None]
    rotary = decoder.rotary_emb(stream, position)
    kept = Kept([*model.parameters(), *model.buffers(), *rotary])
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), kept:
        decoder.layers[0](
            stream, position_embeddings=rotary, position_ids=position, geometry=row.geometry
        )
    sizes = sizes_of(model)
    size = 4 if fp32 else 2
    row = Row(256, size, dropout, train_all=train_all, cuda=False, example=128)
    casts = 0 if fp32 else 2 * (sizes.linears if train_all else sizes.adapters)
    counted = 256 * sum(kept_in_a_layer(sizes, row).values()) + casts
    assert kept.bytes == pytest.approx(counted, rel=0.02)


SMOL = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
SMOL |= dict(head_dim=64, tie_word_embeddings=True, vocab_size=4096)


@pytest.mark.parametrize(
    "how, checkpointing, layers",
    [
        ("lora", False, 30),
        ("lora", True, 4),
        ("qlora", False, 4),
        ("qlora", True, 30),
        ("full", False, 30),
        ("full", True, 4),
        ("autocast", False, 4),
        ("autocast", True, 4),
    ],
)
def test_what_a_step_holds(how, checkpointing, layers):
    """SmolLM2-135M has 30 such layers. What is there all the time, and what a row adds, to 15 %
    each; a step's first row has left its gradients."""
    train_all = how in ("full", "autocast")
    dtype = torch.float32 if train_all else torch.bfloat16
    model = make(
        t.LlamaConfig, "full" if train_all else how, dtype, num_hidden_layers=layers, **SMOL
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lm = PackedLM(model, autocast=torch.bfloat16 if how == "autocast" else None).train()
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(s.nbytes() for s in {t.untyped_storage() for t in tensors})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    with Alive(tensors) as alive:
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        states = alive.now
        (-lm(examples([128, 128], 4096)).logps.sum()).backward()
    measured = alive.peak - states
    size = 4 if how == "full" else 2
    row = Row(256, size, checkpointing=checkpointing, train_all=train_all, cuda=False, example=128)
    counted = row_bytes(sizes_of(model), row)
    assert weights + states == pytest.approx(sum(standing_bytes(model).values()), rel=0.01)
    assert measured == pytest.approx(sum(counted.values()), rel=0.15)


# ---------------------------------------------------------------------------------- paged AdamW


def test_paged_adamw_is_adamw(monkeypatch):
    """To the last bit, in parts of several parameters or of one, where gradients are missing; what
    it keeps stays in its place, and a step computes on copies."""
    monkeypatch.setattr(paged, "PART", 20)
    sizes, results = [(3, 5), (7,), (20, 20), (1,)], []
    for kind in (torch.optim.AdamW, paged.AdamW):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
        optimizer = kind([{"params": weights[:2], "lr": 0.3}, {"params": weights[2:]}], fused=True)
        pages = []
        for step in range(4):
            for i, w in enumerate(weights):
                w.grad = None if (step, i) in ((0, 1), (2, 3)) else torch.randn_like(w)
            optimizer.step()
            pages.append([id(t) for t in optimizer.state[weights[0]].values()])
        kept = [t for w in weights for t in optimizer.state[w].values()]
        results.append([*weights, *kept])
        assert len(kept) == 12 and pages == 4 * pages[:1]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("most, expected", [(10, [2, 1, 1]), (1, [1] * 4), (1000, [4])])
def test_parts(most, expected):
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (4, 6, 30, 2)]
    parts = list(paged.parts(parameters, most))
    assert [len(part) for part in parts] == expected
    assert all(a is b for a, b in zip(sum(parts, []), parameters))


# --------------------------------------------------------------------------------------- the tool

SHAPES = Path(__file__).parent.parent / "docs" / "shapes"


def printed(capsys, *words):
    memory.main([str(word) for word in words])
    return capsys.readouterr().out


def test_the_shapes_are_the_models():
    """Their numbers of weights are those that the models' cards state, in billions."""
    stated = {
        "qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.61,
        "qwen2.5-14b": 14.7, "qwen2.5-32b": 32.5, "qwen2.5-72b": 72.7, "llama-3.2-1b": 1.23,
        "llama-3.2-3b": 3.21, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.6,
    }  # fmt: skip
    assert {path.stem for path in SHAPES.glob("*.json")} == stated.keys()
    for name, billions in stated.items():
        config = t.AutoConfig.from_pretrained(SHAPES / f"{name}.json")
        weights = all_weights(skeleton(config, torch.bfloat16))
        assert weights / 1e9 == pytest.approx(billions, rel=0.01)


def test_the_table_by_hand(capsys):
    """Llama-3.1-8B in 4 bits. Its layers have 4096 x (2 x 4096 + 2 x 1024 + 3 x 14336) weights, A
    and B of rank 16 have 16 x (4 x 4096 + 2 x 5120 + 3 x 18432), embedding and head 128256 x 4096.
    """
    out = printed(
        capsys, "dpo", "--model_name_or_path", SHAPES / "llama-3.1-8b.json", "--load_in_4bit",
        "--gradient_checkpointing", "--max_row_tokens", "2048",
    )  # fmt: skip
    gib, adapters = 2**30, 32 * 16 * (4 * 4096 + 2 * 5120 + 3 * 18432)
    lines = out.splitlines()
    assert lines[1] == "rows of 2,048 tokens, checkpointed: 7.8 GiB on 16 GB"
    table = dict(reversed(line.split(maxsplit=1)) for line in lines[2:10])
    linears = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert float(table["weights in few bits"]) == round(linears * 4.5 / 8 / gib, 2)
    assert float(table["other frozen weights"]) == round(2 * 2 * 128257 * 4096 / gib, 2)
    assert float(table["AdamW's states"]) == round(adapters * 8 / gib, 2)
    assert float(table["kept for backward"]) == round(32 * 2048 * 4096 * 2 / gib, 2)


def test_ranks_by_hand(capsys):
    """The same model, cut between two cards: of it all each has half, and gathers two layers and
    embedding and head; the adapter stays whole."""
    words = "dpo", "--model_name_or_path", SHAPES / "llama-3.1-8b.json", "--ranks", 2
    table = dict(reversed(x.split(maxsplit=1)) for x in printed(capsys, *words).splitlines()[2:10])
    layer, rest = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336 + 2), 2 * 128256 * 4096 + 4096
    assert float(table["other frozen weights"]) == round((32 * layer + rest) / 2**30, 2)
    assert float(table["gathered weights"]) == round(2 * (2 * layer + rest) / 2**30, 2)
    assert float(table["what trains"]) == 0.16


def test_a_reference_of_its_own_stays_in_16_bits(capsys):
    """Where all weights train too: it is as large as the file, 2 bytes a weight."""
    model = SHAPES / "llama-3.2-1b.json"
    words = "--model_name_or_path", model, "--ref_model_name_or_path", model
    out = printed(capsys, "dpo", *words, "--use_peft", "false")
    (line,) = [line for line in out.splitlines() if "the reference's weights" in line]
    assert float(line.split()[0]) == round(2 * 1_235_814_400 / 2**30, 2)


def test_the_advice_makes_it_fit(capsys):
    """The flags that a card's line names, given, fit it, with the bytes that it told."""
    words = "sft", "--model_name_or_path", SHAPES / "llama-3.1-8b.json", "--max_row_tokens", "1024"
    lines = [line for line in printed(capsys, *words).splitlines() if " GB  " in line]
    assert [line.split(" GB")[0].strip() for line in lines] == "8 16 24 48 80 141".split()
    (card, rest), *others = [line.split(" GB  with ") for line in lines if " GB  with " in line]
    flags, run = rest.split(": ", maxsplit=1)
    assert "--load_in_4bit true" in flags and len(others) == 1
    run = run.split(";")[0]
    assert f"{card} GB  {run}" in printed(capsys, *words, *flags.split()).splitlines()
    assert " GB  " not in printed(capsys, *words, "--device", "cpu")


def test_scaling_md_has_the_tools_table(capsys):
    page = (SHAPES.parent / "scaling.md").read_text(encoding="utf-8")
    models = SHAPES / "qwen2.5-0.5b.json", SHAPES / "llama-3.2-1b.json"
    for line in printed(capsys, "table", *models).splitlines():
        assert line in page


def test_it_asks_for_a_model(capsys):
    with pytest.raises(SystemExit) as stop:
        memory.main(["kto", "--beta", "0.2"])
    said = "memory: error: --model_name_or_path: give the model to train\n"
    assert stop.value.code == 2 and capsys.readouterr().err == said
