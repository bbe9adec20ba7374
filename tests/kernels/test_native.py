"""Which instruction set is used, and what is said when there is none."""

import ctypes
import subprocess
import sys

import pytest

from modelgrove_kernels import native


def test_none_asks_for_plain_torch(monkeypatch):
    monkeypatch.setenv("MODELGROVE_ISA", "none")
    assert native.isa() == "none"
    assert native.library() is None
    assert native.absence() == "MODELGROVE_ISA=none asks for plain torch"


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("MODELGROVE_ISA", "sse2")
    with pytest.raises(ValueError, match="sse2 is unknown, only avx2, avx512vnni, none"):
        native.isa()


def test_a_set_that_the_cpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(native, "_best", lambda: "avx2")
    monkeypatch.setenv("MODELGROVE_ISA", "avx512vnni")
    with pytest.raises(ValueError, match="this CPU has avx2 only"):
        native.isa()


def test_a_missing_library_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv("MODELGROVE_ISA", raising=False)
    monkeypatch.setattr(native, "PATH", tmp_path / "_native.so")
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    monkeypatch.setattr(native, "_best", native._best.__wrapped__)
    assert native.library() is None
    assert "without a C compiler" in native.absence()


def test_a_broken_library_says_so(monkeypatch, tmp_path):
    (tmp_path / "_native.so").write_text("no library")
    monkeypatch.delenv("MODELGROVE_ISA", raising=False)
    monkeypatch.setattr(native, "PATH", tmp_path / "_native.so")
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    monkeypatch.setattr(native, "_best", native._best.__wrapped__)
    assert "cannot be loaded" in native.absence()


@pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.absence()}")
def test_the_library_is_the_one_beside_the_package():
    assert isinstance(native.library(), ctypes.CDLL)
    code = "from modelgrove_kernels import native; print(native.isa())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() in native.ISAS
