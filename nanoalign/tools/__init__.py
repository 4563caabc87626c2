"""Commands: python -m nanoalign.chat, .compare, .data, .merge, .plot."""
