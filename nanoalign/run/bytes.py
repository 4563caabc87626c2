"""What a step holds on its device, in bytes, counted from shapes before anything is computed.

Always there are the weights and, of what trains, the gradient and AdamW's two states
(`standing_bytes`). To these comes the row of T tokens that is being computed (`row_bytes`).
Autograd keeps a tensor from forward to backward where a gradient can't be computed without it: x of
a product W x whose W trains (but not of a frozen one), both factors of an elementwise product.
`kept_in_a_layer` lists these tensors. What is kept grows until the head is reached and shrinks from
there, so a row is at its largest at one of these moments:

    at the head    some copies of a chunk of logits (fast/head.py) lie on top of all that is kept
    in a layer     the gradients inside its MLP do; and with checkpointing, which kept no more than
                   the layers' inputs, all that is kept of this one layer
    in autocast    with checkpointing, the forward pass ends with all weights in 16 bits as well

The list is that of layers like Llama's: norms that square in fp32, an MLP with a gate. Where an
activation is written out in several operations, as in Phi's MLP, autograd keeps more. Not counted
are the gaps in the allocator's memory: leave it some percent.
"""

import math
from dataclasses import dataclass

from torch import nn

from nanoalign.fast.attention import BLOCK, SHORT
from nanoalign.lora import LoRALinear
from nanoalign.nf4 import FrozenLinear

ATTENTION = "attention's output"


@dataclass(frozen=True)
class Sizes:
    """A model as widths: how many numbers a token has in the places of a decoder layer."""

    layers: int
    hidden: int  # d, of the stream between the layers
    query: int  # of all heads together
    key: int  # of all key-value heads together
    heads: int
    mlp: int  # f; of a mixture that of all experts which a token meets
    gated: bool  # does the MLP have a gate, act(gate) * up?
    norms: int  # what its norms read, together
    readers: tuple[tuple[str, int], ...]  # what each product that trains reads: its name and width
    ranks: int  # r of all LoRA layers together
    adapters: int  # weights of their A and B
    linears: int  # weights of its linear layers
    largest: int  # weights of the largest of them
    four_bit: bool  # are they decoded at each use?
    vocabulary: int
    tied: bool


@dataclass(frozen=True)
class How:
    """How a row is computed."""

    tokens: int  # T
    size: int = 2  # bytes of a number: bfloat16
    dropout: float = 0.0  # before each A
    checkpointing: bool = False
    compiled: bool = False  # the layers
    train_all: bool = False  # fp32 weights; where `size` is 2, autocast computes
    chunk: int = 1024  # rows of logits at a time: fast/head.py's chunk_rows
    sharded: bool = False  # --fsdp
    cuda: bool = True
    example: int = 512  # tokens of an example: without CUDA attention is computed for each

    @property
    def stream(self) -> int:
        """Bytes of a number between the layers, which autocast leaves in the weights' fp32."""
        return 4 if self.train_all else self.size


def head_size(config) -> int:
    """How many numbers a head of attention has."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def sizes_of(model: nn.Module) -> Sizes:
    """Of a model of transformers, with or without LoRA; what trains is what requires a gradient.
    The parameters may be on the meta device, where they have shapes and no memory."""
    config, layer = model.config.get_text_config(), model.get_decoder().layers[-1]
    hidden, heads, width = config.hidden_size, config.num_attention_heads, head_size(config)
    query, key = heads * width, (getattr(config, "num_key_value_heads", None) or heads) * width
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    if experts := getattr(config, "num_experts_per_tok", None):
        mlp = experts * (getattr(config, "moe_intermediate_size", None) or mlp)

    norms, readers, loras, linears, four_bit = 0, [], [], [], False
    for path, module in layer.named_modules():
        parent, _, name = path.rpartition(".")
        if "norm" in name:  # queries and keys have norms of their own in some models
            norms += {"q": query, "k": key}.get(name[0], hidden)
        if isinstance(module, LoRALinear):
            loras.append(module)
            width = module.base_layer.in_features
        elif hasattr(module, "in_features") and name not in ("lora_A", "lora_B"):
            linears.append(module.in_features * module.out_features)
            four_bit = four_bit or isinstance(module, FrozenLinear)
            if not any(p.requires_grad for p in module.parameters()):
                continue
            width = module.in_features
        else:
            continue
        last = name in ("o_proj", "out_proj", "dense")
        readers.append((ATTENTION if last else parent, width))
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    return Sizes(
        layers=len(model.get_decoder().layers),
        hidden=hidden,
        query=query,
        key=key,
        heads=heads,
        mlp=mlp,
        gated=any("gate" in name for name, _ in layer.named_parameters()),
        norms=norms,
        readers=tuple(readers),
        ranks=sum(m.lora_A.out_features for m in loras),
        adapters=sum(m.lora_A.weight.numel() + m.lora_B.weight.numel() for m in loras),
        linears=sum(linears),
        largest=max(linears, default=0),
        four_bit=four_bit,
        vocabulary=len(output.weight),
        tied=output.weight is embedding.weight,
    )


def standing_bytes(model: nn.Module) -> dict[str, int]:
    """What is there from the first step to the last: bytes by kind."""
    packed = {id(b) for m in model.modules() if isinstance(m, FrozenLinear) for b in m.buffers()}
    kinds = {"weights in few bits": 0, "other frozen weights": 0, "what trains": 0}
    for tensor in (*model.parameters(), *model.buffers()):
        frozen = "weights in few bits" if id(tensor) in packed else "other frozen weights"
        kinds["what trains" if tensor.requires_grad else frozen] += tensor.nbytes
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return kinds | {"its gradients": 4 * trained, "AdamW's states": 8 * trained}


def sharded_bytes(model: nn.Module, ranks: int) -> dict[str, int]:
    """The same with --fsdp, on each of several ranks: its part of the frozen weights or, where all
    weights train, of all there is. While a row is computed two layers lie there gathered, one
    that computes and the next, and embedding and head: if they are frozen, as they are stored. If
    all train, layers are gathered in 16 bits, embedding and head in 32; the gradients of a layer
    are there in 16 bits and once more in 32, to be summed, those of embedding and head in 32."""
    kinds, all_train = standing_bytes(model), all(p.requires_grad for p in model.parameters())
    for kind in kinds if all_train else ("weights in few bits", "other frozen weights"):
        kinds[kind] = math.ceil(kinds[kind] / ranks)
    layers, cut = model.get_decoder().layers, {}
    for name, module in (("model", model), ("layers", layers), ("layer", layers[-1])):
        tensors = (*module.parameters(), *module.buffers())
        cut[name] = sum(t.nbytes for t in tensors if all_train or not t.requires_grad)
    layer, rest = cut["layer"], cut["model"] - cut["layers"]
    gathered = 2 * layer + rest
    if all_train:  # `layer` and `rest` are bytes in fp32
        gathered = (1 + 1.5) * layer + 2 * rest
    return kinds | {"gathered weights": round(gathered)}


def kept_in_a_layer(s: Sizes, how: How) -> dict[str, float]:
    """What autograd keeps of one decoder layer from forward to backward, in bytes a token."""
    size, reads = how.size, [read for read in s.readers if read[0] != ATTENTION]
    if how.dropout and s.ranks:  # for each A: what it reads after dropout, and dropout's mask
        inputs = sum(n for _, n in s.readers) * (size + (1 if how.cuda else size))
    elif how.train_all and size < 4:  # autocast makes each product its own copy of the stream
        inputs = sum(n for _, n in reads) * size
    else:  # q, k and v read one tensor, gate and up another
        inputs = sum(n for _, n in set(reads)) * size
    kept = {
        # in fp32; compiled layers compute them again from the stream
        "what norms read": s.norms * (how.stream if how.compiled else 4),
        "queries, keys, values": (s.query + 2 * s.key) * size,
        ATTENTION: s.query * size + 4 * s.heads,  # and each head's log-sum-exp
        # act(gate) * up: both factors, and gate for the slope of act; without a gate, act's input
        "the MLP's factors": s.mlp * size * ((2 if how.compiled else 3) if s.gated else 1),
        "what A or a trained W reads": inputs,
        "A x": s.ranks * size,
    }
    if how.train_all and not how.compiled:
        kept["what norms multiply with their weights"] = s.norms * how.stream
    if not how.cuda:
        kept["attention's weights"] = s.heads * keys_met(how.example) * size
    return kept


def keys_met(example: int) -> float:
    """With how many keys a query is multiplied where there is no CUDA (fast/attention.py): those
    before it and in its block, on average. No weights are kept of more than SHORT keys."""
    return 0 if example > SHORT else (example + min(example, BLOCK)) / 2


def in_the_mlp(s: Sizes, how: How) -> int:
    """The gradients inside a layer's MLP: of what down reads, once through W and once through A (or
    of act(gate) and of up), and of the stream. On the way forward it holds as much."""
    return how.tokens * (2 * s.mlp * how.size + s.hidden * (how.stream + how.size))


def beside_a_product(s: Sizes, how: How) -> int:
    """What a product needs beside the gradients that `in_the_mlp` counts: a weight decoded from 4
    bits; or, where all weights train, its weight's gradient, as it is computed and in fp32, and
    that of a head, which waits for the gradient of the embedding that it is tied to."""
    size = s.largest * how.size if s.four_bit else 0
    if how.train_all:
        size += s.largest * (4 + how.size) + 4 * s.vocabulary * s.hidden * s.tied
    return size


def at_the_head(s: Sizes, how: How) -> int:
    """A chunk of logits, beside the one before it, which is freed last: in one kernel a chunk's
    gradient takes its place, else there is a buffer in fp32, and the gradient has its own memory in
    16 bits. The hidden states and their gradient. Of a head that trains its gradient, a chunk's
    part of it, and its weight in 16 bits."""
    size, several = how.size, how.tokens > how.chunk
    copies = (1 + several) * size if how.cuda else 4 + (1 + several + (size < 4)) * size
    total = min(how.tokens, how.chunk) * s.vocabulary * copies + 2 * how.tokens * s.hidden * size
    if how.train_all:
        total += s.vocabulary * s.hidden * (4 + size + (size if size < 4 else 0))
    return total


def row_bytes(s: Sizes, how: How) -> dict[str, int]:
    """What a row adds to what is always there when it is at its largest: bytes by kind."""
    # Of fp32 weights a copy in 16 bits is used, and kept. Sharded ones are gathered in 16 bits.
    casts = s.linears if how.train_all else s.adapters
    casts *= how.size if how.size < 4 and not (how.train_all and how.sharded) else 0
    layer = how.tokens * sum(kept_in_a_layer(s, how).values()) + casts
    inside, kept = in_the_mlp(s, how), s.layers * layer
    moments = {"at the head": at_the_head(s, how), "in a layer": inside + beside_a_product(s, how)}
    if how.checkpointing:
        kept = s.layers * how.tokens * s.hidden * how.stream
        moments["in a layer"] += layer
    if how.checkpointing and how.train_all:
        moments["in autocast"] = s.layers * casts + inside
    moment = max(moments, key=moments.get)
    return {"kept for backward": round(kept), moment: round(moments[moment])}
