"""Commands: python -m nanoalign.chat, .data, .merge, .plot."""
