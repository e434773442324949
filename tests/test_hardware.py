"""The compute dtype follows the processor."""

import pytest

from k2rl import hardware

ZEN_3 = "processor\t: 0\nflags\t\t: fpu sse2 avx fma avx2 f16c\n\nprocessor\t: 1\nflags\t\t: fpu sse2 avx2\n"
ZEN_4 = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni\n"
SAPPHIRE_RAPIDS = "flags\t\t: fpu avx512f amx_bf16 amx_tile\n"
GRAVITON_3 = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd sve bf16 i8mm\n"
RASPBERRY_PI_5 = "Features\t: fp asimd evtstrm\nCPU part\t: 0xd0b\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (ZEN_3, False),
        (ZEN_4, True),
        (SAPPHIRE_RAPIDS, True),
        (GRAVITON_3, True),
        (RASPBERRY_PI_5, False),
        ("", False),
    ],
)
def test_bfloat16_is_read_off_the_flags(cpuinfo: str, expected: bool) -> None:
    assert hardware.has_bfloat16_flag(cpuinfo) is expected


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_dtype(monkeypatch: pytest.MonkeyPatch, native: bool, dtype: str) -> None:
    monkeypatch.setattr(hardware, "cpu_multiplies_bfloat16", lambda: native)
    assert hardware.fast_dtype(gpu=False) == dtype
    assert hardware.fast_dtype(gpu=True) == "bfloat16"
