"""Turns preference files into packed batches, with numpy and the tokenizer; nothing here imports a model."""
