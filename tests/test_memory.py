"""What fits where: the counts against what autograd keeps and what tensors really hold."""

import weakref

import pytest
import torch
import transformers as t
from conftest import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanoalign.formats.weights import freeze_linears
from nanoalign.logps import PackedLM
from nanoalign.lora import add_lora
from nanoalign.packing import Example, pack, packed
from nanoalign.run.bytes import How, kept_in_a_layer, row_bytes, sizes_of, standing_bytes


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


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """The bytes that autograd keeps, but for those of `others`."""

    def __init__(self, others):
        self.storages = {tensor.untyped_storage()._cdata: None for tensor in others}
        super().__init__(self.note, lambda tensor: tensor)

    def note(self, tensor):
        storage = tensor.untyped_storage()
        self.storages.setdefault(storage._cdata, storage)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values() if storage is not None)


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
    how = How(256, size, dropout, train_all=train_all, cuda=False, example=128)
    casts = 0 if fp32 else 2 * (sizes.linears if train_all else sizes.adapters)
    counted = 256 * sum(kept_in_a_layer(sizes, how).values()) + casts
    assert kept.bytes == pytest.approx(counted, rel=0.02)


SMOL = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
SMOL |= dict(head_dim=64, tie_word_embeddings=True, vocab_size=4096)


@pytest.mark.parametrize(
    "how, checkpointing, layers",
    [
        ("lora", False, 30),
        ("lora", True, 6),
        ("qlora", False, 6),
        ("qlora", True, 30),
        ("full", False, 30),
        ("full", True, 6),
        ("autocast", False, 6),
        ("autocast", True, 6),
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
    row = alive.peak - states
    size = 4 if how == "full" else 2
    how = How(256, size, checkpointing=checkpointing, train_all=train_all, cuda=False, example=128)
    counted = row_bytes(sizes_of(model), how)
    assert weights + states == pytest.approx(sum(standing_bytes(model).values()), rel=0.01)
    assert row == pytest.approx(sum(counted.values()), rel=0.15)
