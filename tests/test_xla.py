"""Programs that are compiled once: arguments of another shape, type or sharding are an error that names them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.runtime.clocks import Stopwatch
from dpo_jax.runtime.xla import Compiled

QUICK = {"xla_backend_optimization_level": 0}


def make_program(**options):
    jitted = jax.jit(lambda params, scale: jax.tree.map(lambda x: x * scale, params), **options)
    return Compiled("scaling", jitted, Stopwatch())


def params(rows=3, dtype: type[np.generic] = np.float32):
    return {"head": {"kernel": np.ones((rows, 2), dtype)}, "bias": np.zeros(2, np.float32)}


def test_a_program_compiles_once_and_takes_arguments_like_the_first(capsys):
    program = make_program()
    first = program.compile(params(), 2.0)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params())
    assert program.compile(shapes, 2.0) is first and program.compile(params(), 3.0, options={}) is first
    scaled = program(jax.tree.map(jnp.asarray, params()), 4.0)
    np.testing.assert_array_equal(scaled["head"]["kernel"], np.full((3, 2), 4.0))
    assert capsys.readouterr().err.count("compiled scaling in") == 1


@pytest.mark.parametrize("called", ["compile", "__call__"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((params(rows=4), 2.0), r"argument 0/head/kernel: got float32\[4, 2\].*; expected float32\[3, 2\]"),
        ((params(dtype=np.int32), 2.0), r"argument 0/head/kernel: got int32\[3, 2\]; expected float32\[3, 2\]"),
        ((params(), 2), r"argument 1: got int32\[\]; expected float32\[\]"),
        (({"bias": np.zeros(2, np.float32)}, 2.0), r"argument 0/head/kernel: got none; expected float32\[3, 2\]"),
        ((params() | {"scale": np.ones(2)}, 2.0), r"argument 0/scale: got float32\[2\]; expected none"),
    ],
)
def test_other_shapes_and_types_are_an_error_that_names_program_and_argument(called, other, message):
    program = make_program()
    program.compile(params(), 2.0)
    with pytest.raises(TypeError, match=rf"program 'scaling', {message}"):
        getattr(program, called)(*other)


@pytest.mark.parametrize("called", ["compile", "__call__"])
def test_another_sharding_is_an_error_that_names_both(called):
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    sharded, replicated = (
        jax.device_put({"kernel": np.ones((4, 2), np.float32)}, NamedSharding(mesh, PartitionSpec(*axes)))
        for axes in (("fsdp",), ())
    )
    program = make_program()
    program(sharded, 2.0)
    with pytest.raises(TypeError, match=r"argument 0/kernel: got float32\[4, 2\] .*expected float32\[4, 2\] .*'fsdp'"):
        getattr(program, called)(replicated, 2.0)
    # Host arrays and numbers have no sharding of their own, and go where the program wants them.
    np.testing.assert_array_equal(program({"kernel": np.ones((4, 2), np.float32)}, 3.0)["kernel"], np.full((4, 2), 3.0))


def test_other_compiler_options_at_a_later_call_are_an_error():
    program = make_program()
    first = program.compile(params(), 2.0, options=QUICK)
    assert program.compile(params(), 2.0) is first and program.compile(params(), 2.0, options=QUICK) is first
    with pytest.raises(TypeError, match="program 'scaling': got compiler options .*: 2.* expected .*: 0"):
        program.compile(params(), 2.0, options={"xla_backend_optimization_level": 2})
    without = make_program()
    without.compile(params(), 2.0)
    with pytest.raises(TypeError, match="program 'scaling': got compiler options"):
        without.compile(params(), 2.0, options=QUICK)


def test_errors_of_the_program_itself_pass_through():
    def failing(x):
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        Compiled("failing", jax.jit(failing), Stopwatch())(1.0)
