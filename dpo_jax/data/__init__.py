"""From preference files to packed batches: numpy and the tokenizer, never a model."""
