"""An adapter and its base -> one ordinary model that anything can open.

    python -m nanoalign.merge runs/dpo merged
    python -m nanoalign.merge runs/dpo merged --dtype float32

W + scaling * B A becomes the weight, in fp32 and rounded once; token rows, modules that trained
whole and trained biases take their places. Then the adapter costs nothing at inference.

**A base in 4 bits.** An adapter that was trained on a 4-bit base has learned a change of the
ROUNDED weights, and part of what it learned is to make up for the rounding. So the merge is with
those: dequantize, add, save dense. It is exact, whereas the original bf16 weights plus the adapter
are a model that nobody trained or measured. Rounding the sum to 4 bits again would cost a third of
the adapter's own effect, so it is never done here; who wants it can quantize the merged model, and
see what it costs.

Training writes beside the adapter that its base was in 4 bits, and how (quantized.NOTE). Adapters
of other tools don't say: --load_in_4bit does.
"""

import sys
from argparse import BooleanOptionalAction
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer

from nanoalign import InputError
from nanoalign.formats.peft import load_adapter, read_adapter_config
from nanoalign.formats.quantized import read_note
from nanoalign.lora import LoRALinear, TokenRows, TrainedModule, add_lora
from nanoalign.model import load_lm
from nanoalign.nf4 import NF4Linear
from nanoalign.run.flags import Parser
from nanoalign.run.session import one_line_errors

SAMPLE = "The quick brown fox jumps over the lazy dog. Why is the sky blue? 2 + 2 = 4, 7 * 8 = 56."


def dense_linear(layer: nn.Module) -> nn.Module:
    """An NF4Linear -> the nn.Linear that it computes; anything else as it is."""
    if not isinstance(layer, NF4Linear):
        return layer
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
    linear.bias = layer.bias
    return linear


def merged(module: nn.Module) -> nn.Module:
    """What a wrapper of lora.py, or a 4-bit layer, amounts to, as a plain module in fp32."""
    if isinstance(module, TrainedModule):
        return merged(module.modules_to_save)  # holds what trained, in fp32
    if isinstance(module, TokenRows):
        table = module.base_layer.float()
        table.weight.data[module.rows] = module.row_weight.data
        return table
    if isinstance(module, LoRALinear):
        base = merged(module.base_layer).float()
        base.weight.data += module.delta()
        return base
    return dense_linear(module)


@torch.no_grad()
def merge_adapter(model: nn.Module, dtype: torch.dtype) -> None:
    """Merge what add_lora added, in place; the model is dense afterwards, in `dtype`."""
    wrappers = (LoRALinear, TrainedModule, TokenRows, NF4Linear)
    names = [name for name, module in model.named_modules() if isinstance(module, wrappers)]
    for name in names:
        if not any(name.startswith(f"{outer}.") for outer in names):  # one may wrap another
            module = merged(model.get_submodule(name))
            model.set_submodule(name, to_dtype(module, dtype))
    to_dtype(model, dtype)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    model.config.tie_word_embeddings = head.weight is embedding.weight  # a trained head is not


def to_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters only: a computed buffer (rotary frequencies) keeps its fp32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


@torch.no_grad()
def sample_logits(model: nn.Module, tokenizer) -> torch.Tensor:
    ids = torch.tensor([tokenizer(SAMPLE)["input_ids"]], device=model.device)
    return model(ids, use_cache=False).logits[0].float()  # (T, V)


def merge(
    adapter: str,
    directory: str,
    base: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    load_in_4bit: bool | None = None,
    double_quant: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write base + adapter to `directory`, dense, in `dtype` (auto: that of the base).

    load_in_4bit None: if the note beside the adapter says so.
    """
    lora, note = read_adapter_config(adapter), read_note(adapter)
    base = base or lora.base_model_name_or_path
    if not base:
        raise InputError(f"{adapter}: does not name its base; give --model_name_or_path")
    _make_empty(Path(directory))
    loaded = dtype
    if load_in_4bit is None and note:
        load_in_4bit, double_quant, loaded = True, note["double_quant"], note["dtype"]
    elif load_in_4bit:
        loaded = "auto"  # what the weights were rounded from, whatever is written
    tokenizer = _tokenizer(adapter, base, trust_remote_code)

    lm = load_lm(base, loaded, device, False, trust_remote_code, bool(load_in_4bit), double_quant)
    model = lm.model
    out_dtype = model.dtype if dtype == "auto" else getattr(torch, dtype)
    if lora.trainable_token_indices and len(tokenizer) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if out_dtype == torch.float32:
        to_dtype(model, torch.float32)  # computes in it; 4-bit weights remain what they were
    add_lora(model, lora)
    load_adapter(model, adapter)
    model.eval()
    before = sample_logits(model, tokenizer)
    merge_adapter(model, out_dtype)
    change = (sample_logits(model, tokenizer) - before).abs().max()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(
        f"largest change of a logit on {len(before)} sample tokens: {change:.2g}; "
        f"the largest logit is {before.abs().max():.3g}"
    )
    print(f"saved in {directory}, dense in {str(out_dtype).removeprefix('torch.')}")


def _make_empty(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise InputError(f"{directory}: not empty")
    except OSError as error:
        raise InputError(f"{directory}: {error.strerror}") from None


def _tokenizer(adapter: str, base: str, trust_remote_code: bool):
    """The adapter's own, with its new tokens and its chat template, or else that of the base."""
    own = (Path(adapter) / "tokenizer_config.json").exists()
    name = adapter if own else base
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: no tokenizer: {str(error).splitlines()[0]}") from None


def main(argv: list[str]) -> None:
    """Parse the flags and merge; what the user can mend is one line and exit code 2."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = Parser((), prog="nanoalign.merge", description=__doc__.splitlines()[0],
                    allow_abbrev=False)  # fmt: skip
    parser.add_argument("adapter", help="directory of an adapter")
    parser.add_argument("directory", help="where the merged model goes")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--model_name_or_path", dest="base", help="another base than it names")
    parser.add_argument("--load_in_4bit", action=BooleanOptionalAction, help="base was in 4 bits")
    parser.add_argument("--use_bnb_nested_quant", dest="double_quant", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trust_remote_code", action="store_true")
    with one_line_errors("nanoalign.merge"):
        merge(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])
