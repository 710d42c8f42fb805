"""The decoder, its families, and reading and writing their Hugging Face folders."""
