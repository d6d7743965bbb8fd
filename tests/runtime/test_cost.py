import pytest

from mae_jax.runtime import hlo
from mae_jax.runtime.chips import Chip
from mae_jax.runtime.cost import read_kernels, totals

# A GPU's program in the compiler's own words, shortened: a loop of five rounds in which one fusion reads a slice of a
# stack, and another writes one in place; a product of cuBLAS, one of Triton, an attention kernel, and a call.
GPU = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/run.py"
2 "/home/me/mae_jax/models/layers.py"

FunctionNames
1 "main"
2 "Linear.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=0 end_column=9}
2 {file_name_id=2 function_name_id=2 line=42 end_line=42 column=4 end_column=30}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%read (stack: f32[5,8,4], index: s32[]) -> (bf16[8,4], f32[]) {
  %stack = f32[5,8,4]{2,1,0} parameter(0)
  %convert = bf16[5,8,4]{2,1,0} convert(%stack)
  %index = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,4]{2,1,0} dynamic-slice(%convert, %index, %zero, %zero), dynamic_slice_sizes={1,8,4}
  %one = bf16[8,4]{1,0} bitcast(%slice)
  %wide = f32[8,4]{1,0} convert(%one)
  %none = f32[] constant(0)
  %sum = f32[] reduce(%wide, %none), dimensions={0,1}, to_apply=%add
  ROOT %both = (bf16[8,4]{1,0}, f32[]) tuple(%one, %sum)
}

%write (kept: bf16[5,8,4], value: bf16[8,4], index.1: s32[]) -> bf16[5,8,4] {
  %kept = bf16[5,8,4]{2,1,0} parameter(0)
  %value = bf16[8,4]{1,0} parameter(1)
  %row = bf16[1,8,4]{2,1,0} bitcast(%value)
  %index.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = bf16[5,8,4]{2,1,0} dynamic-update-slice(%kept, %row, %index.1, %zero.1, %zero.1)
}

%gemm (left: bf16[16,8], right: bf16[8,4]) -> bf16[16,4] {
  %left = bf16[16,8]{1,0} parameter(0)
  %right = bf16[8,4]{1,0} parameter(1)
  %dot = f32[16,4]{1,0} dot(%left, %right), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %narrow = bf16[16,4]{1,0} convert(%dot)
}

%body (carried: (s32[], f32[5,8,4], bf16[5,8,4])) -> (s32[], f32[5,8,4], bf16[5,8,4]) {
  %carried = (s32[], f32[5,8,4]{2,1,0}, bf16[5,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %in = f32[5,8,4]{2,1,0} get-tuple-element(%carried), index=1
  %out = bf16[5,8,4]{2,1,0} get-tuple-element(%carried), index=2
  %read.1 = (bf16[8,4]{1,0}, f32[]) fusion(%in, %i), kind=kInput, calls=%read, \
metadata={op_name="jit(step)/while/body/reduce_sum" stack_frame_id=2}
  %row.1 = bf16[8,4]{1,0} get-tuple-element(%read.1), index=0
  %write.1 = bf16[5,8,4]{2,1,0} fusion(%out, %row.1, %i), kind=kLoop, calls=%write
  %step = s32[] constant(1)
  %next = s32[] add(%i, %step)
  ROOT %result = (s32[], f32[5,8,4]{2,1,0}, bf16[5,8,4]{2,1,0}) tuple(%next, %in, %write.1)
}

%condition (carried.1: (s32[], f32[5,8,4], bf16[5,8,4])) -> pred[] {
  %carried.1 = (s32[], f32[5,8,4]{2,1,0}, bf16[5,8,4]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carried.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

%called (arrived: bf16[16,4]) -> bf16[4,16] {
  %arrived = bf16[16,4]{1,0} parameter(0)
  ROOT %turned = bf16[4,16]{1,0} transpose(%arrived), dimensions={1,0}
}

ENTRY %main (a: f32[5,8,4], b: bf16[16,8], c: bf16[2,64,3,16], d: bf16[5,8,4]) -> bf16[4,16] {
  %a = f32[5,8,4]{2,1,0} parameter(0)
  %b = bf16[16,8]{1,0} parameter(1)
  %c = bf16[2,64,3,16]{3,2,1,0} parameter(2)
  %d = bf16[5,8,4]{2,1,0} parameter(3)
  %start = s32[] constant(0)
  %first = (s32[], f32[5,8,4]{2,1,0}, bf16[5,8,4]{2,1,0}) tuple(%start, %a, %d)
  %while = (s32[], f32[5,8,4]{2,1,0}, bf16[5,8,4]{2,1,0}) while(%first), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %weights = bf16[8,4]{1,0} bitcast(%b)
  %blas = (f32[16,16]{1,0}, s8[4096]{0}) custom-call(%b, %b), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %attended = (bf16[2,64,3,16]{3,2,1,0}, f32[2,3,64]{2,1,0}) custom-call(%c, %c, %c), \
custom_call_target="__gpu$xla.gpu.triton", backend_config={ir = "MLIR", name = "mha_forward", num_stages = 2 : i32}
  %gemm.1 = bf16[16,4]{1,0} fusion(%b, %weights), kind=kCustom, calls=%gemm
  ROOT %called.1 = bf16[4,16]{1,0} call(%gemm.1), to_apply=%called
}
"""

TPU = """\
HloModule jit_step

%body (carried: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carried = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %x = f32[8]{0} get-tuple-element(%carried), index=1
  %y = f32[8]{0} copy(%x), backend_config={"window_config":{"estimated_cycles":"100"}}
  %step = s32[] constant(1)
  %next = s32[] add(%i, %step), backend_config={"flag_configs":[]}
  ROOT %result = (s32[], f32[8]{0}) tuple(%next, %y)
}

%condition (carried.1: (s32[], f32[8])) -> pred[] {
  %carried.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carried.1), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %start = s32[] constant(0)
  %first = (s32[], f32[8]{0}) tuple(%start, %a)
  %while = (s32[], f32[8]{0}) while(%first), condition=%condition, body=%body
  %last = f32[8]{0} get-tuple-element(%while), index=1
  ROOT %copy = f32[8]{0} copy(%last), backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""


def kernels(text):
    return {kernel.instruction.name: kernel for kernel in read_kernels(hlo.parse(text))}


def test_a_slice_of_a_stack_counts_as_what_it_is():
    read = kernels(GPU)["read.1"]  # one of five f32[8,4], through a cast, and an index; a bf16[8,4] and a sum
    assert read.bytes == 4 * 32 + 4 + 2 * 32 + 4


def test_a_slice_that_is_written_in_place_counts_as_what_it_is():
    write = kernels(GPU)["write.1"]  # reads a bf16[8,4] and an index, writes a bf16[8,4]
    assert write.bytes == 2 * 32 + 4 + 2 * 32


def test_what_stands_in_a_loop_counts_as_often_as_it_goes_round():
    found = kernels(GPU)
    assert {name: kernel.times for name, kernel in found.items()} == {
        "read.1": 5, "write.1": 5, "next": 5, "blas": 1, "attended": 1, "gemm.1": 1, "turned": 1
    }  # fmt: skip
    assert all(kernel.is_exact for kernel in found.values())


def test_a_loop_of_unknown_length_is_said_to_be_one():
    text = GPU.replace('backend_config={"known_trip_count":{"n":"5"}}', "").replace("direction=LT", "direction=NE")
    found = read_kernels(hlo.parse(text))
    assert totals(found).launches == 7 and not totals(found).is_exact


def test_products_count_two_operations_for_each_multiplication():
    found = kernels(GPU)
    assert found["gemm.1"].flops == 2 * 16 * 4 * 8
    assert found["blas"].flops == 2 * 16 * 16 * 8
    assert found["attended"].flops == 2 * (2 * 2 * 3 * 64 * 64 * 16)  # q k^T and weights times v of 2 x 3 heads
    assert found["read.1"].flops == found["turned"].flops == 0


def test_attention_counts_whole_blocks_of_tokens_and_widths_of_powers_of_two():
    text = GPU.replace("bf16[2,64,3,16]", "bf16[2,70,3,20]").replace('"mha_forward"', '"attention_gradient"')
    assert kernels(text)["attended"].flops == 2 * 7 * (2 * 3 * 128 * 128 * 32)


def test_a_product_moves_its_operands_and_result_but_no_workspace():
    found = kernels(GPU)
    assert found["blas"].bytes == 2 * 16 * 8 + 4 * 16 * 16  # one operand, given twice
    assert found["gemm.1"].bytes == 2 * (16 * 8 + 8 * 4 + 16 * 4)


def test_a_custom_kernel_that_is_not_known_has_no_count_of_operations():
    found = read_kernels(hlo.parse(GPU.replace('name = "mha_forward"', 'name = "mine"')))
    assert [kernel.instruction.name for kernel in found if kernel.flops is None] == ["attended"]
    assert totals(found).unknown == 1


def test_a_roofline_takes_the_longer_of_products_and_bytes():
    chip = Chip("test", (), 989.0, 0, 48.0, {"major": 9})  # reaches 790 operations and 42 bytes a second
    found = kernels(GPU)
    assert found["write.1"].seconds(chip) == pytest.approx(5 * 132 / 42)
    assert found["attended"].seconds(chip) == pytest.approx(found["attended"].flops / 790)


def test_cycles_of_a_tpu_are_summed_over_rounds_that_the_counter_tells():
    found = read_kernels(hlo.parse(TPU))
    assert totals(found).cycles == 3 * 100 + 7 and totals(found).launches == 4
    assert sum(kernel.seconds(Chip("test", (), 0, 0, 0, clock=1e3)) for kernel in found) == pytest.approx(0.307)


def test_an_instruction_names_the_lines_of_python_that_it_comes_from():
    module = hlo.parse(GPU)
    instruction = kernels(GPU)["read.1"].instruction
    assert hlo.stack(module, instruction) == [("/home/me/mae_jax/models/layers.py", 42), ("/home/me/run.py", 7)]
    assert hlo.op_name(instruction) == "jit(step)/while/body/reduce_sum"
    assert hlo.stack(module, kernels(GPU)["write.1"].instruction) == []
