"""Other people's files: rows of data, chat templates, adapters, weights in 16 bits and in 4."""
