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

Training writes beside the adapter that its base was in 4 bits, and how (weights.NOTE). Adapters
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
from nanoalign.formats.files import from_pretrained
from nanoalign.formats.peft import add_adapter, load_adapter, read_adapter_config
from nanoalign.formats.weights import FORMATS, load_lm, read_note
from nanoalign.lora import plain, tied
from nanoalign.run.flags import Parser
from nanoalign.run.session import one_line_errors

SAMPLE = "The quick brown fox jumps over the lazy dog. Why is the sky blue? 2 + 2 = 4, 7 * 8 = 56."


@torch.no_grad()
def merge_adapter(model: nn.Module, dtype: torch.dtype) -> None:
    """Merge what add_adapter added, in place; the model is dense afterwards, in `dtype`."""
    names = [name for name, module in model.named_modules() if hasattr(module, "merge")]
    for name in names:
        if not any(name.startswith(f"{outer}.") for outer in names):  # one may wrap another
            model.set_submodule(name, to_dtype(plain(model.get_submodule(name)), dtype))
    to_dtype(model, dtype)
    model.config.tie_word_embeddings = tied(model)  # a head that trained on its own is not


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
    quant_type: str = "nf4",
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
    frozen = {}
    if load_in_4bit is None and note:
        frozen = {"load_in_4bit": True, **note}
    elif load_in_4bit:  # in the dtype that the weights were rounded from, whatever is written
        frozen = {"load_in_4bit": True, "quant_type": quant_type, "double_quant": double_quant}
    tokenizer = _tokenizer(adapter, base, trust_remote_code)

    how = {"device": device, "trust_remote_code": trust_remote_code, **(frozen or {"dtype": dtype})}
    model = load_lm(base, **how).model
    out_dtype = model.dtype if dtype == "auto" else getattr(torch, dtype)
    if lora.trainable_token_indices and len(tokenizer) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if out_dtype == torch.float32:
        to_dtype(model, torch.float32)  # computes in it; 4-bit weights remain what they were
    add_adapter(model, lora)
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
    return from_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)


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
    parser.add_argument("--bnb_4bit_quant_type", dest="quant_type", default="nf4", choices=FORMATS)
    parser.add_argument("--use_bnb_nested_quant", dest="double_quant", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trust_remote_code", action="store_true")
    with one_line_errors("nanoalign.merge"):
        merge(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])
