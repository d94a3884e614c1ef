"""The bytes that device kernels move, in programs so small that they can be added up by hand."""

import pytest

from benchmarks.hlo import DeviceKernel, device_kernels

ADD = """
ENTRY %main (a: f32[10], b: bf16[10]) -> f32[10] {
  %a = f32[10]{0} parameter(0)
  %b = bf16[10]{0} parameter(1)
  %both = (f32[10]{0}, bf16[10]{0}) tuple(%a, %b)
  %same = f32[10]{0} get-tuple-element(%both), index=0
  ROOT %sum = f32[10]{0} add(%same, %b), metadata={op_name="add(f32[99])"}
}
"""

ROWS = """
%rows (x: f32[100,4], i: s32[]) -> f32[2,4] {
  %x = f32[100,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %flat = f32[400]{0} bitcast(%x)
  %block = f32[40]{0} dynamic-slice(%flat, %i), dynamic_slice_sizes={40}
  ROOT %part = f32[2,4]{1,0} slice(%block), slice={[0:8]}
}

ENTRY %main (x: f32[100,4], i: s32[]) -> f32[2,4] {
  %x = f32[100,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %taken = f32[2,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%rows
}
"""

BESIDE_OTHERS = ROWS.replace(
    "ROOT %taken = f32[2,4]{1,0} fusion(%x, %i)",
    "%start = ((f32[100,4]{1,0}, s32[]), f32[2,4]{1,0}, u32[]) fusion-start(%x, %i)",
).replace("calls=%rows\n", "calls=%rows\n  ROOT %done = f32[2,4]{1,0} fusion-done(%start)\n")

ALL = ROWS.replace("slice(%block)", "add(%block, %x)")

CONVERTED_ROWS = ROWS.replace("f32[2,4]", "bf16[2,4]").replace(
    "  ROOT %part = bf16[2,4]{1,0} slice(%block)",
    "  %half = bf16[40]{0} convert(%block)\n  ROOT %part = bf16[2,4]{1,0} slice(%half)",
)

IN_PLACE = """
%write (x: f32[100,4], new: f32[1,4], i: s32[]) -> f32[100,4] {
  %x = f32[100,4]{1,0} parameter(0)
  %new = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = f32[100,4]{1,0} dynamic-update-slice(%x, %new, %i, %i)
}

ENTRY %main (x: f32[100,4], new: f32[1,4], i: s32[]) -> f32[100,4] {
  %x = f32[100,4]{1,0} parameter(0)
  %new = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %written = f32[100,4]{1,0} fusion(%x, %new, %i), kind=kLoop, calls=%write
}
"""

SEVERAL_IN_PLACE = """
%write (x: f32[100,4], y: f8e4m3fn[100,4], i: s32[]) -> (f32[100,4], f8e4m3fn[50,8], f32[2]) {
  %x = f32[100,4]{1,0} parameter(0)
  %y = f8e4m3fn[100,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %row = f32[1,4]{1,0} constant({...})
  %small = f8e4m3fn[1,4]{1,0} constant({...})
  %a = f32[100,4]{1,0} dynamic-update-slice(%x, %row, %i, %i)
  %b = f8e4m3fn[100,4]{1,0} dynamic-update-slice(%y, %small, %i, %i)
  %c = f8e4m3fn[50,8]{1,0} bitcast(%b)
  %d = f32[2]{0} atan2(%row, %row)
  ROOT %all = (f32[100,4]{1,0}, f8e4m3fn[50,8]{1,0}, f32[2]{0}) tuple(%a, %c, %d)
}

ENTRY %main (x: f32[100,4], y: f8e4m3fn[100,4], i: s32[]) -> (f32[100,4], f8e4m3fn[50,8], f32[2]) {
  %x = f32[100,4]{1,0} parameter(0)
  %y = f8e4m3fn[100,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %written = (f32[100,4], f8e4m3fn[50,8], f32[2]) fusion(%x, %y, %i), kind=kLoop, calls=%write
}
"""

ALONE = """
ENTRY %main (x: f32[100,4], i: s32[]) -> f32[100,4] {
  %x = f32[100,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,4]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,4}
  ROOT %y = f32[100,4]{1,0} dynamic-update-slice(%x, %row, %i, %i)
}
"""

LOOP = """
%body (state: (s32[], f32[10])) -> (s32[], f32[10]) {
  %state = (s32[], f32[10]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[10]{0} get-tuple-element(%state), index=1
  %y = f32[10]{0} negate(%x)
  ROOT %next = (s32[], f32[10]{0}) tuple(%i, %y)
}

ENTRY %main (state: (s32[], f32[10])) -> (s32[], f32[10]) {
  %state = (s32[], f32[10]{0}) parameter(0)
  ROOT %loop = (s32[], f32[10]{0}) while(%state), body=%body, config={"known_trip_count":{"n":"7"}}
}
"""

CALL = """
ENTRY %main (x: f32[4,2]) -> f32[4] {
  %x = f32[4,2]{1,0} parameter(0)
  %called = (f32[4]{0}, u8[16]{0}) custom-call(%x), custom_call_target="library"
  ROOT %y = f32[4]{0} get-tuple-element(%called), index=0
}
"""


# A TPU fetches an array, and a part of another one, into its own memory ahead of their use. Its arrays fill
# tiles: 3 x 5 numbers take 8 x 128. The scatter is written into an operand, by a fusion inside a fusion.
ON_TPU = """
%scatter (x: f32[8,128], i: s32[2], new: f32[2,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %i = s32[2]{0} parameter(1)
  %new = f32[2,128]{1,0} parameter(2)
  ROOT %y = f32[8,128]{1,0:T(8,128)} scatter(%x, %i, %new), to_apply=%last
}

%write (new: f32[2,128], i: s32[2], x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(2)
  %new = f32[2,128]{1,0} parameter(0)
  %i = s32[2]{0} parameter(1)
  ROOT %inner = f32[8,128]{1,0:T(8,128)} fusion(%x, %i, %new), kind=kCustom, calls=%scatter
}

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %new = f32[2,128]{1,0:T(2,128)S(1)} constant({...})
  %i = s32[2]{0:T(128)S(1)} constant({...})
  %y = f32[8,128]{1,0:T(8,128)} fusion(%new, %i, %x), kind=kCustom, calls=%write
  ROOT %next = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%n, %y)
}

%below (state: (s32[], f32[8,128])) -> pred[] {
  %state = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %last = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%n, %last), direction=LT
}

ENTRY %main (a: f32[3,5], b: f32[16,128], state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %a = f32[3,5]{1,0:T(8,128)} parameter(0)
  %b = f32[16,128]{1,0:T(8,128)} parameter(1)
  %state = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(2)
  %c = (f32[3,5]{1,0:T(8,128)S(1)}, f32[3,5]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %d = f32[3,5]{1,0:T(8,128)S(1)} copy-done(%c)
  %e = ((f32[16,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%b)
  %f = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%e)
  %g = f32[8,128]{1,0:T(8,128)S(1)} pad(%d, %f)
  ROOT %loop = (s32[], f32[8,128]{1,0:T(8,128)}) while(%state), condition=%below, body=%body
}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ADD, 40 + 20 + 40),
        (ROWS, 32 + 4 + 32),
        (BESIDE_OTHERS, 32 + 4 + 32),
        (CONVERTED_ROWS, 32 + 4 + 16),
        (ALL, 1600 + 4 + 32),
        (IN_PLACE, 16 + 4 + 16),
        (SEVERAL_IN_PLACE, 16 + 4 + 8 + 4),
        (ALONE, 16 + 4 + 4 + 16 + 2 * 16),
        (LOOP, 7 * (40 + 40)),
        (CALL, 32 + 16 + 16),
        (ON_TPU, 4096 + 4096 + 7 * 1024),
    ],
    ids=[
        "operands",
        "rows",
        "beside others",
        "converted rows",
        "all",
        "in place",
        "several in place",
        "alone",
        "loop",
        "library",
        "on a TPU",
    ],
)
def test_bytes_read_and_written_are_counted(text: str, expected: int):
    assert sum(kernel.bytes for kernel in device_kernels(text)) == expected


def test_device_kernels_are_named_after_their_sources():
    assert device_kernels(ADD) == [DeviceKernel("add(f32[99])", 100, "sum")]
    assert device_kernels(CALL) == [DeviceKernel("custom-call", 64, "called")]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (', config={"known_trip_count":{"n":"7"}}', "", "a loop with an unknown number of rounds: loop"),
        ("negate(", "call(", "an operation of the kind call: y"),
        ("negate(", "all-reduce-start(", "an operation of the kind all-reduce-start: y"),
    ],
)
def test_programs_that_cannot_be_counted_are_refused(old: str, new: str, error: str):
    with pytest.raises(ValueError, match=error):
        device_kernels(LOOP.replace(old, new))
