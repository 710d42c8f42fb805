"""Memory of compiled programs, as the compiler reports it."""


def temporary_bytes(jitted, *args):
    """Returns bytes of temporaries per device of a jitted function, compiled for arguments or structs like these."""
    memory = jitted.lower(*args).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes
