import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.collectives import Collective, ideal, read_collectives, table

WHOLE = P()
SHAPE = {"data": 2, "fsdp": 2, "tensor": 2}


def communicates(fn, *shapes, out_specs=WHOLE) -> list[Collective]:
    """What fn does on a 2 x 2 x 2 mesh, each device with arguments of these shapes."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), tuple(SHAPE), axis_types=(AxisType.Auto,) * 3)
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(P(),) * len(shapes), out_specs=out_specs, check_vma=False)
    compiled = jax.jit(mapped).lower(*[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]).compile()
    return read_collectives(compiled.as_text(), mesh.shape)


def test_a_sum_in_a_scan_counts_as_often_as_the_scan_goes_round():
    def fn(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(jnp.sin(c), "tensor"), None), x, None, length=7)[0]

    assert communicates(fn, (4, 16)) == [Collective("all-reduce", "f32", ("tensor",), 2, 7, 4 * 16 * 4)]


def test_scans_inside_scans_multiply():
    def inner(c, _):
        return jax.lax.psum(jnp.sin(c), ("data", "fsdp")), None

    def outer(c, _):
        return jax.lax.scan(inner, jnp.cos(c), None, length=3)[0], None

    found = communicates(lambda x: jax.lax.scan(outer, x, None, length=5)[0], (8,))
    assert found == [Collective("all-reduce", "f32", ("data", "fsdp"), 4, 15, 32)]


@pytest.mark.parametrize("axis, spanned", [("fsdp", ("fsdp",)), (("data", "tensor"), ("data", "tensor"))])
def test_gathering_counts_its_result_and_scattering_its_operand(axis, spanned):
    def fn(kernel):
        whole = jax.lax.all_gather(kernel, axis, axis=0, tiled=True)
        return jax.lax.psum_scatter(jnp.sin(whole), axis, scatter_dimension=0, tiled=True)

    size = 2 ** len(spanned)
    gather, scatter = communicates(fn, (3, 5))
    assert gather == Collective("all-gather", "f32", spanned, size, 1, size * 60)
    assert scatter == Collective("reduce-scatter", "f32", spanned, size, 1, size * 60)


def test_half_precision_counts_two_bytes():  # a CPU's own programs widen it before they send it
    (found,) = read_collectives(program("%r = bf16[6,5]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups={}"))
    assert (found.types, found.payload) == ("bf16", 60)


def test_arrays_that_are_summed_together_all_count():
    found = communicates(lambda x, y: jax.lax.psum((x, y), "data"), (4, 4), (6,), out_specs=(P(), P()))
    assert sum(c.bytes for c in found) == (16 + 6) * 4
    assert {c.axes for c in found} == {("data",)}


def test_what_goes_round_or_across_counts_what_leaves_a_device():
    swap = communicates(lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), (5,))
    assert swap == [Collective("collective-permute", "f32", ("data",), 2, 1, 20)]
    across = communicates(lambda x: jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True), (4, 6))
    assert across == [Collective("all-to-all", "f32", ("tensor",), 2, 1, 96)]


def test_a_gradient_summed_by_the_compiler_is_found():
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, P("data"))
    whole = jax.sharding.NamedSharding(mesh, P())
    grad = jax.jit(jax.grad(lambda w, x: jnp.mean((x @ w) ** 2)), in_shardings=(whole, rows), out_shardings=whole)
    text = grad.lower(jnp.zeros((12, 3)), jnp.zeros((16, 12))).compile().as_text()
    assert read_collectives(text, mesh.shape) == [Collective("all-reduce", "f32", ("data",), 8, 1, 12 * 3 * 4)]


def program(*lines: str, computations: str = "") -> str:
    """HLO text with these lines in its entry."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, num_partitions=8\n\n{computations}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"


GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"
ASYNC = [  # as GPUs' programs have them
    ("%s = f32[64]{0} all-reduce-start(%p), to_apply=%add", ("all-reduce", "f32", 256)),
    ("%s = (f32[64]{0}, bf16[8]{0}) all-reduce-start(%p, %q), to_apply=%add", ("all-reduce", "bf16+f32", 272)),
    ("%s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%p), dimensions={0}", ("all-gather", "bf16", 256)),
    (
        "%s = ((f32[2]{0}, f32[3]{0}), (f32[8]{0}, f32[12]{0})) all-gather-start(%p, %q), dimensions={0}",
        ("all-gather", "f32", 80),
    ),
    ("%s = ((f32[64]{0}), f32[16]{0}) reduce-scatter-start(%p), to_apply=%add", ("reduce-scatter", "f32", 256)),
    ("%s = (f32[9]{0}, f32[9]{0}, u32[], u32[]) collective-permute-start(%p)", ("collective-permute", "f32", 36)),
]


@pytest.mark.parametrize("line, expected", ASYNC, ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_what_is_started_and_awaited_counts_once(line, expected):
    (found,) = read_collectives(program(f"{line}, {GROUPS}", "ROOT %d = f32[4]{0} all-reduce-done(%s)"))
    assert (found.kind, found.types, found.payload, found.executions, found.group_size) == (*expected, 1, 4)


def test_a_generic_start_counts_what_it_calls_once():
    called = (
        "%wrapped (a: f32[64]) -> f32[16] {\n"
        f"  ROOT %r = f32[16]{{0}} reduce-scatter(%a), {GROUPS}, dimensions={{0}}, to_apply=%add\n}}\n"
    )
    text = program(
        "%s = ((f32[64]{0}), f32[16]{0}, u32[]) async-start(%p), calls=%wrapped",
        "%u = ((f32[64]{0}), f32[16]{0}, u32[]) async-update(%s), calls=%wrapped",
        "ROOT %d = f32[16]{0} async-done(%u), calls=%wrapped",
        computations=called,
    )
    assert read_collectives(text) == [Collective("reduce-scatter", "f32", None, 4, 1, 256)]


def test_a_tpus_collective_in_several_fusions_counts_once():
    gather = f'%g = bf16[16]{{0}} all-gather(%a), channel_id=4, {GROUPS}, frontend_attributes={{chain_id="0"}}'
    called = "".join(
        f"%{name} (a: bf16[4]) -> bf16[16] {{\n  {gather}\n  ROOT %c = bf16[16]{{0}} custom-call(%g), {target}\n}}\n"
        for name, target in (
            ("first", 'custom_call_target="AsyncCollectiveStart"'),
            ("beside", 'custom_call_target="Other"'),
            ("last", 'custom_call_target="AsyncCollectiveDone"'),
        )
    )
    calls = [f"%{n} = bf16[16]{{0}} fusion(%p), kind=kCustom, calls=%{n}" for n in ("first", "beside", "last")]
    assert read_collectives(program(*calls, computations=called)) == [Collective("all-gather", "bf16", None, 4, 1, 32)]


def test_a_tpus_fused_reduce_scatter_is_one():
    called = (
        "%all-reduce-scatter.1 (a: f32[64]) -> f32[16] {\n"
        f"  %r = f32[64]{{0:T(8,128)}} all-reduce(%a), {GROUPS}, to_apply=%add\n"
        "  ROOT %s = f32[16]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={16}\n}\n"
    )
    text = program("ROOT %f = f32[16]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", computations=called)
    assert read_collectives(text) == [Collective("reduce-scatter", "f32", None, 4, 1, 256)]


def loop(limit: str, note: str = "") -> str:
    """A program with a sum in a loop whose counter starts at 2 and grows by 3, as a TPU's text has it."""
    called = (
        "%body (c: (s32[], f32[4])) -> (s32[], f32[4]) {\n"
        "  %i = s32[]{:T(128)} get-tuple-element(%c), index=0\n"
        "  %three = s32[]{:T(128)} constant(3)\n"
        "  %next = s32[]{:T(128)} add(%i, %three)\n"
        "  %copied = s32[]{:T(128)} copy(%next)\n"
        "  %x = f32[4]{0} get-tuple-element(%c), index=1\n"
        "  %r = f32[4]{0} all-reduce(%x), replica_groups={}, to_apply=%add\n"
        "  ROOT %t = (s32[]{:T(128)}, f32[4]{0}) tuple(%copied, %r)\n}\n"
        "%condition (c: (s32[], f32[4])) -> pred[] {\n"
        f"  %limit = s32[]{{:T(128)}} {limit}\n"
        "  %i = s32[]{:T(128)} get-tuple-element(%c), index=0\n"
        "  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT\n}\n"
    )
    return program(
        "%two = s32[]{:T(128)} constant(2)",
        "%start = s32[]{:T(128)} copy(%two)",
        "%t = (s32[]{:T(128)}, f32[4]{0}) tuple(%start, %p)",
        f"%w = (s32[]{{:T(128)}}, f32[4]{{0}}) while(%t), condition=%condition, body=%body{note}",
        computations=called,
    )


@pytest.mark.parametrize("limit, rounds", [(2, 0), (3, 1), (11, 3), (12, 4)])
def test_a_loop_without_a_note_is_counted_by_its_counter(limit, rounds):
    (found,) = read_collectives(loop(f"constant({limit})"))
    assert (found.executions, found.is_exact, found.group_size) == (rounds, True, 8)


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    found = read_collectives(loop("parameter(0)"))
    assert [(c.executions, c.is_exact) for c in found] == [(1, False)]
    assert "at least" in table(found)


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("{{0,3},{1,2},{4,7},{5,6}}", None),
        ("{}", ("data", "fsdp", "tensor")),
        ("[4,2]<=[8]", ("tensor",)),
        ("[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ("data", "tensor")),
        ("mesh['a'=8] {'a':(2)2}", ("fsdp",)),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,1,3,4,6,5,7) {'b':(2)2}", ("fsdp",)),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", ("data", "fsdp")),
    ],
)
def test_groups_are_named_by_the_axes_that_they_span(groups, axes):
    line = f"%r = f32[4]{{0}} all-reduce(%p), replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
    (found,) = read_collectives(program(line), SHAPE)
    assert found.axes == axes


def test_a_ring_sends_a_sum_twice_and_the_rest_once():
    def sent(kind):
        return Collective(kind, "f32", None, 4, 3, 100).wire_bytes

    assert (sent("all-reduce"), sent("all-gather"), sent("reduce-scatter")) == (450, 225, 225)


def test_the_table_adds_up_what_is_alike():
    text = table([Collective("all-reduce", "f32", ("data",), 8, times, size << 20) for times, size in ((3, 1), (1, 2))])
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["all-reduce", "f32", "data", "8", "4", "5.0", "8.8"],
        ["all", "4", "5.0", "8.8"],
    ]
    assert table([]) == "no communication between devices"


def test_data_parallelism_must_sum_every_gradient_once():
    assert ideal({"data": 8, "fsdp": 1, "tensor": 1}, split=1000, whole=24) == [
        Collective("all-reduce", "f32", ("data",), 8, 1, 4000),
        Collective("all-reduce", "f32", ("data",), 8, 1, 96),
    ]
    assert ideal({"data": 1, "fsdp": 1, "tensor": 1}, split=1000, whole=24) == []


def test_fsdp_must_gather_twice_and_scatter_once():
    found = ideal({"data": 2, "fsdp": 4, "tensor": 1}, split=1000, whole=24, gather_bytes=2)
    assert found == [
        Collective("all-gather", "bf16", ("fsdp",), 4, 2, 2000),
        Collective("reduce-scatter", "f32", ("fsdp",), 4, 1, 4000),
        Collective("all-reduce", "f32", ("data",), 2, 1, 1000),
        Collective("all-reduce", "f32", ("data", "fsdp"), 8, 1, 96),
    ]


def test_a_tensor_parallel_step_does_what_theory_says():
    """Two blocks of two halves (columns, then rows), against Megatron's two sums forward and two backward."""
    x = (6, 8)

    def half(x, pair):
        columns, rows = pair
        return x + jax.lax.psum(jnp.sin(x @ columns) @ rows, "tensor"), None

    def step(columns, rows, x):
        def loss(kernels):
            y, _ = jax.lax.scan(half, x, kernels)
            return jnp.mean(y**2)

        return jax.grad(loss)((columns, rows))

    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 1, 2), tuple(SHAPE), axis_types=(AxisType.Auto,) * 3)
    specs = (P(None, None, "tensor"), P(None, "tensor"))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(*specs, P()), out_specs=specs)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 8, 16), (4, 16, 8), x)]
    found = read_collectives(jax.jit(mapped).lower(*shapes).compile().as_text(), mesh.shape)
    (theory,) = ideal(mesh.shape, split=0, whole=0, stream=6 * 8, depth=2)
    assert sum(c.bytes for c in found) == theory.bytes
    assert {c.axes for c in found} == {("tensor",)}
