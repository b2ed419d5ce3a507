"""Finding and compiling the native library: every tier, every failure, several processes at once."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap

import pytest
import torch

from openxlstm.ops import explain, mlstm_initial_state, mlstm_step
from openxlstm.ops.native import build, loader


def test_status(native):
    status = loader.status()
    assert status.tier in ("shipped", "compiled")
    assert status.isa == status.isas[0]
    assert "portable" in status.isas
    assert os.path.exists(status.path)
    assert status.threads == torch.get_num_threads()
    assert status.reason is None


def test_importing_does_nothing(compiler):
    program = "import openxlstm.ops.native.loader, openxlstm.ops"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert compiler.compiled() == 0
    assert not compiler.cache.exists()


def test_two_processes_compile_once_and_others_reuse_it(compiler, load):
    program = "from openxlstm.ops.native import loader; s = loader.status(); print(s.tier, s.path, s.reason)"
    jobs = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [job.communicate() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0][0].startswith(b"compiled ")
    assert compiler.compiled() == 1
    found = load()
    assert found.tier == "compiled"
    assert compiler.compiled() == 1
    assert sorted(p.suffix for p in compiler.cache.iterdir()) == [".lock", ".sha256", build.SUFFIX]

    whole = found.path.read_bytes()
    found.path.unlink()  # it is mapped into this process
    found.path.write_bytes(whole[:1000])  # a damaged entry is made again
    assert load().library is not None
    assert compiler.compiled() == 2


def test_no_compiler(load, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENXLSTM_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = load()
    assert found.tier == "unavailable"
    assert "no C++ compiler found: install g++ or clang" in found.reason
    assert "using PyTorch" in found.reason
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "named by CXX, 'no-such-compiler', does not exist" in load().reason


def test_a_shipped_library_comes_first_and_needs_no_compiler(native, load, monkeypatch):
    made = loader._find()
    monkeypatch.setattr(loader, "_shipped", lambda: made.path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = load()
    assert (found.tier, found.path, found.isas) == ("shipped", made.path, made.isas)


def test_a_shipped_library_that_does_not_load(load, monkeypatch, tmp_path):
    shipped = tmp_path / "libopenxlstm.so"
    shipped.write_text("not a library")
    monkeypatch.setattr(loader, "_shipped", lambda: shipped)
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = load()
    assert found.tier == "unavailable"
    assert found.reason.startswith("the shipped native library does not load")
    assert "'no-such-compiler', does not exist; using PyTorch" in found.reason


def test_broken_compiler(load, monkeypatch, tmp_path):
    script = tmp_path / "broken"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cpp:1: error: it broke"\nexit 1\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("OPENXLSTM_CACHE", str(tmp_path / "cache"))
    found = load()
    assert found.tier == "unavailable"
    assert "failed: x.cpp:1: error: it broke" in found.reason
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["native.lock"]


def test_cache_that_cannot_be_written(load, compiler, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPENXLSTM_CACHE", str(tmp_path / "file" / "below"))
    found = load()
    assert found.tier == "unavailable"
    assert "set OPENXLSTM_CACHE to a directory that can be written" in found.reason


def test_without_a_library_pytorch_does_the_work_and_explain_says_why(monkeypatch):
    monkeypatch.setattr(
        loader, "_find", lambda: loader._Loaded("unavailable", reason="no C++ compiler found")
    )
    assert "mlstm_step/native: cannot: no C++ compiler found" in explain("mlstm_step")
    assert "mlstm_step/recurrent: chosen by 'auto'" in explain("mlstm_step")
    assert "rnn/scan: chosen by 'auto'" in explain("rnn")
    ones, gates, state = torch.ones(1, 1, 2), torch.zeros(1, 1), mlstm_initial_state(1, 1, 2, 2)
    mlstm_step(ones, ones, ones, gates, gates, state)
    with pytest.raises(
        ValueError, match="'native' of mlstm_step cannot serve this call: no C\\+\\+ compiler"
    ):
        mlstm_step(ones, ones, ones, gates, gates, state, backend="native")


def test_switched_off(monkeypatch):
    monkeypatch.setenv("OPENXLSTM_NATIVE", "0")
    assert loader.status().tier == "disabled"
    assert "rnn/native: cannot: turned off by OPENXLSTM_NATIVE=0" in explain("rnn")


def test_an_instruction_set_the_machine_lacks(native, monkeypatch):
    monkeypatch.setenv("OPENXLSTM_ISA", "portabel")
    with pytest.raises(ValueError, match=r"OPENXLSTM_ISA=portabel: this machine does not have .*'portable'"):
        explain("rnn")
    missing = "avx2" if "neon" in build.instruction_sets() else "neon"
    monkeypatch.setenv("OPENXLSTM_ISA", missing)
    with pytest.raises(ValueError, match=r"Choose one of: .*portable"):
        loader.status()


def test_a_forked_process_and_several_threads_work(native):
    program = """
        import os, threading, torch
        from openxlstm.ops import rnn
        torch.set_num_threads(2)
        x, weight = torch.randn(4, 20, 1, 4, 8), torch.randn(1, 4, 8, 8)
        expected = rnn("elman", x, weight, backend="native")
        def check():
            for _ in range(20):
                assert torch.equal(rnn("elman", x, weight, backend="native"), expected)
        child = os.fork()
        check()
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        workers = [threading.Thread(target=check) for _ in range(4)]
        [w.start() for w in workers], [w.join() for w in workers]
        check()
        print("done")
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert result.stdout == "done\n", result.stderr
