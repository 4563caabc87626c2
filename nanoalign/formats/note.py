"""The note beside an adapter that says in which format its base was frozen."""

import json
from pathlib import Path

from torch import nn

from nanoalign import InputError
from nanoalign.formats.bitsandbytes import DTYPES
from nanoalign.formats.weights import FORMATS, frozen_layers

NOTE = "base_quantization.json"  # in an adapter's directory: the frozen base it was trained on


def write_note(model: nn.Module, directory: Path) -> None:
    """Say beside an adapter in which format its base was frozen, if it was.

    An adapter learns to live with the rounding of its base, so a merge has to know of it. PEFT's
    adapter_config.json has no place for that (it warns of each key it does not know), hence a file.
    """
    path, layer = Path(directory) / NOTE, next(iter(frozen_layers(model).values()), None)
    if layer is None:
        return path.unlink(missing_ok=True)  # of another adapter, which is overwritten
    note = {
        "bnb_4bit_quant_type": next(name for name, kind in FORMATS.items() if type(layer) is kind),
        "bnb_4bit_use_double_quant": vars(layer).get("double_quant", False),
        "dtype": str(layer.dtype).removeprefix("torch."),
    }
    path.write_text(json.dumps(note, indent=2) + "\n")


def read_note(directory: str | Path) -> dict | None:
    """What write_note wrote, as load_lm's quant_type, double_quant and dtype; None without one."""
    path = Path(directory) / NOTE
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        kind, dtype = note["bnb_4bit_quant_type"], note["dtype"]
        FORMATS[kind], DTYPES[dtype]
        double_quant = bool(note["bnb_4bit_use_double_quant"])
        return {"quant_type": kind, "double_quant": double_quant, "dtype": dtype}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not what was written here: {error!r}") from None


def format_for(adapter: str | None, quant_type: str, double_quant: bool) -> dict:
    """The quant_type and double_quant to load an adapter's base with: what its note says, and else
    the flags. A flag that is not at its default and says otherwise is an InputError."""
    asked = {"quant_type": quant_type, "double_quant": double_quant}
    note = adapter and read_note(adapter) or asked
    if quant_type not in ("nf4", note["quant_type"]) or double_quant > note["double_quant"]:
        raise InputError(f"{adapter}: trained on another base than the flags ask for: {note}")
    return {key: note[key] for key in asked}
