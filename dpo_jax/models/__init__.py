"""The decoder: its configuration, layers, rotary positions, attention, mixtures of experts and quantized kernels.

`decoder.hidden_states` is the entry point. Nothing here knows a loss, an optimizer, a file format or the names of the
mesh's axes.
"""
