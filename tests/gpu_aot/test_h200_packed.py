"""Plans that `benchmarks/packed.py` tries for one row, compiled for an H200 without one."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import lowering
import packed
import pytest
from h200 import OPTIONS, h200s
from jax.sharding import SingleDeviceSharding

from dca_jax.inference.compiled import GPU_OPTIONS
from dca_jax.products.packed import pack
from dca_jax.products.packed_row import choose_plan, multiply_row

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin"
    ),
    pytest.mark.gpu_aot,
]


@pytest.mark.parametrize("form", ["int8", "int4:32", "int4:128"])
def test_every_plan_compiles(form: str) -> None:
    """Of the widest and of the deepest matrix; among them what the model takes."""
    where = SingleDeviceSharding(h200s(1)[0])
    for name in ("70B-gate", "70B-down"):
        inputs, outputs = shape = packed.MATRICES[name]
        whole = partial(pack, form=form, num_inputs=1, order=(1, 0))
        one = jax.eval_shape(whole, jax.ShapeDtypeStruct((outputs, inputs), jnp.float32))
        stack = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype, sharding=where), one
        )
        x = jax.ShapeDtypeStruct((1, inputs), jnp.bfloat16, sharding=where)
        layer = jax.ShapeDtypeStruct((), jnp.int32, sharding=where)
        with lowering.device("NVIDIA H200"):
            plans, chosen = packed.row_plans(shape, form), choose_plan(x, [stack])
        print(f"{form}, {name}: {len(plans)} plans")
        assert chosen is None or chosen.splits in {plan.splits for plan in plans}
        for plan in {plans[0], plans[-1]}:
            product = jax.jit(partial(multiply_row, plan=plan))
            program = product.lower(x, [stack], layer).compile(OPTIONS | GPU_OPTIONS)
            assert "dca_packed_row" in program.as_text()
