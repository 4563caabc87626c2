"""The memory that a training step needs, in bytes, computed from shapes before the step.

Some of it is always there: the weights, the gradients of what trains, AdamW's two states
(`standing_bytes`). The rest is for the row that is being computed (`row_bytes`).

Autograd keeps a tensor from forward to backward if a gradient needs it. Of a product W x it keeps x
if W trains, and of an elementwise product it keeps both factors. `kept_in_a_layer` lists these
tensors. Their number grows up to the head, and backward frees them. So a row needs the most memory
at one of these moments:

    at the head    all kept tensors, and some copies of a chunk of logits (fast/head.py)
    in a layer     all kept tensors, and the gradients inside the layer's MLP. With checkpointing:
                   the inputs of all layers, and the kept tensors of this one layer
    in autocast    with checkpointing, at the end of forward: copies of all weights in 16 bits

This is for layers like Llama's: norms that square in fp32, an MLP with a gate. Autograd keeps more
if an activation consists of several operations, as in Phi's MLP. Gaps in the allocator's memory are
not counted: leave some percent free.
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
    """The sizes of a model. A width is how many numbers a token has there."""

    layers: int
    hidden: int  # width of the hidden states, d
    query: int  # width of all heads' queries together
    key: int  # width of all heads' keys together
    heads: int
    mlp: int  # width inside the MLP, f; in a mixture of all experts that a token uses
    gated: bool  # does the MLP have a gate, act(gate) * up?
    norms: int  # width of the inputs of a layer's norms together
    readers: tuple[tuple[str, int], ...]  # name and width of the input of each product that trains
    ranks: int  # r of a layer's LoRA layers together
    adapters: int  # weights of their A and B
    linears: int  # weights of a layer's linear layers
    largest: int  # weights of the largest of these
    four_bit: bool  # are these stored in few bits, and decoded at each use?
    vocabulary: int
    tied: bool  # do embedding and head share their weight?


@dataclass(frozen=True)
class Row:
    """A row of tokens, and how the model computes it."""

    tokens: int  # T
    size: int = 2  # bytes of a number in a product: 2 in bfloat16
    dropout: float = 0.0  # LoRA's, before each A
    checkpointing: bool = False
    compiled: bool = False  # are the layers compiled?
    train_all: bool = False  # all weights train, in fp32; with `size` 2 under autocast
    chunk: int = 1024  # tokens in a chunk of logits: fast/head.py's chunk_rows
    sharded: bool = False  # --fsdp
    cuda: bool = True
    example: int = 512  # tokens of an example; without CUDA attention takes them one by one

    @property
    def stream(self) -> int:
        """Bytes of a number in the hidden states. Autocast leaves these in fp32."""
        return 4 if self.train_all else self.size


def head_size(config) -> int:
    """The width of one head of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes of a model of transformers, with or without LoRA. What requires a gradient trains.
    The parameters may be on the meta device, where they take no memory."""
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
    """Bytes by kind, of what is there from the first step to the last."""
    packed = {id(b) for m in model.modules() if isinstance(m, FrozenLinear) for b in m.buffers()}
    kinds = {"weights in few bits": 0, "other frozen weights": 0, "what trains": 0}
    for tensor in (*model.parameters(), *model.buffers()):
        frozen = "weights in few bits" if id(tensor) in packed else "other frozen weights"
        kinds["what trains" if tensor.requires_grad else frozen] += tensor.nbytes
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return kinds | {"its gradients": 4 * trained, "AdamW's states": 8 * trained}


def sharded_bytes(model: nn.Module, ranks: int) -> dict[str, int]:
    """The same for each rank with --fsdp, where a rank stores a part of the weights.

    With LoRA it has a part of the frozen weights; if all weights train, a part of everything. While
    a row is computed, some weights are gathered whole: the layer that computes, the next one, the
    embedding and the head. Frozen weights are gathered as they are stored. If all weights train,
    layers are gathered in 16 bits, embedding and head in 32. Then a layer's gradients are there in
    16 bits and, for their sum, in 32; those of embedding and head in 32.
    """
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


def kept_in_a_layer(s: Sizes, row: Row) -> dict[str, float]:
    """Bytes a token, by kind, that autograd keeps of one decoder layer until backward."""
    size, reads = row.size, [read for read in s.readers if read[0] != ATTENTION]
    if row.dropout and s.ranks:  # for each A: its input after dropout, and the dropout mask
        inputs = sum(n for _, n in s.readers) * (size + (1 if row.cuda else size))
    elif row.train_all and size < 4:  # autocast copies the hidden states for each product
        inputs = sum(n for _, n in reads) * size
    else:  # q, k and v share one input, gate and up another
        inputs = sum(n for _, n in set(reads)) * size
    kept = {
        # fp32 copies of the hidden states, which compiled layers make again in backward
        "what norms read": s.norms * (row.stream if row.compiled else 4),
        "queries, keys, values": (s.query + 2 * s.key) * size,
        ATTENTION: s.query * size + 4 * s.heads,  # and each head's log-sum-exp
        # of act(gate) * up both factors and gate itself; without a gate, the input of act
        "the MLP's factors": s.mlp * size * ((2 if row.compiled else 3) if s.gated else 1),
        "what A or a trained W reads": inputs,
        "A x": s.ranks * size,
    }
    if row.train_all and not row.compiled:
        kept["what norms multiply with their weights"] = s.norms * row.stream
    if not row.cuda and row.example <= SHORT:  # fast/attention.py keeps none of longer examples
        keys = (row.example + min(row.example, BLOCK)) / 2  # that a query meets, on average
        kept["attention's weights"] = s.heads * keys * size
    return kept


def in_the_mlp(s: Sizes, row: Row) -> int:
    """Bytes of the gradients inside a layer's MLP. Forward needs as many. Two of the MLP's width
    are there at a time: of the input of down through W and through A; later of act(gate) and of up.
    The others are gradients of the hidden states."""
    return row.tokens * (2 * s.mlp * row.size + s.hidden * (row.stream + row.size))


def beside_a_product(s: Sizes, row: Row) -> int:
    """Bytes that a product needs in addition to `in_the_mlp`. A 4-bit weight is decoded. If all
    weights train, there is the weight's gradient, in the dtype of the product and in fp32; and the
    gradient of a tied head, until the embedding's is added to it."""
    size = s.largest * row.size if s.four_bit else 0
    if row.train_all:
        size += s.largest * (4 + row.size) + 4 * s.vocabulary * s.hidden * s.tied
    return size


def at_the_head(s: Sizes, row: Row) -> int:
    """Bytes that the head needs: chunks of logits, the hidden states and their gradient.

    A chunk is freed after the next one is made, so there may be two. On CUDA one kernel writes a
    chunk's gradient over its logits. Elsewhere there is a buffer in fp32 as well, and in 16 bits
    the gradient has memory of its own. A head that trains also has its gradient, a chunk's part of
    that, and its weight in 16 bits.
    """
    size, several = row.size, row.tokens > row.chunk
    copies = (1 + several) * size if row.cuda else 4 + (1 + several + (size < 4)) * size
    total = min(row.tokens, row.chunk) * s.vocabulary * copies + 2 * row.tokens * s.hidden * size
    if row.train_all:
        total += s.vocabulary * s.hidden * (4 + size + (size if size < 4 else 0))
    return total


def row_bytes(s: Sizes, row: Row) -> dict[str, int]:
    """Bytes by kind that a row needs in addition to `standing_bytes`, at its largest moment."""
    # Autocast keeps a 16-bit copy of fp32 weights. Sharded ones are gathered in 16 bits already.
    casts = s.linears if row.train_all else s.adapters
    casts *= row.size if row.size < 4 and not (row.train_all and row.sharded) else 0
    layer = row.tokens * sum(kept_in_a_layer(s, row).values()) + casts
    inside, kept = in_the_mlp(s, row), s.layers * layer
    moments = {"at the head": at_the_head(s, row), "in a layer": inside + beside_a_product(s, row)}
    if row.checkpointing:
        kept = s.layers * row.tokens * s.hidden * row.stream
        moments["in a layer"] += layer
    if row.checkpointing and row.train_all:
        moments["in autocast"] = s.layers * casts + inside
    moment = max(moments, key=moments.get)
    return {"kept for backward": round(kept), moment: round(moments[moment])}
