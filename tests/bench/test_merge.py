"""The rows of bench/merge.py on two small adapters: the right error beside each merger."""

import pytest


@pytest.fixture
def adapters(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "COUNT", 2)
    monkeypatch.setattr(bench, "WIDTH", 64)
    bench.write_adapters(tmp_path, 1)
    return tmp_path


def test_our_sum_is_exact_and_the_legacy_one_is_not(bench, adapters):
    bench.join(adapters, "sum", adapters / "sum")
    bench.join(adapters, "legacy-linear", adapters / "legacy")
    # Two float32 QRs and an SVD.
    assert bench.error_of(adapters / "sum/out", adapters) < 1e-5
    # √(N−1) for two unrelated adapters.
    assert bench.error_of(adapters / "legacy/out", adapters) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("kind", "least", "most"), [("cat", 0, 1e-6), ("svd", 0, 1e-5), ("linear", 0.7, 1.3)])
def test_peft_reads_the_same_files(bench, adapters, kind, least, most):
    bench.join_by_peft(adapters, kind, 1, adapters / kind)
    assert least <= bench.error_of(adapters / kind / "merged", adapters) <= most


def test_a_bake_of_the_bench_s_files_runs(bench, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    (tmp_path / "loras").mkdir()
    base = tmp_path / "base.safetensors"
    save_file({"down_blocks.0.attentions.0.proj_in.weight": torch.zeros(32, 32).half()}, base)
    bench.write_checkpoint_adapters(base, tmp_path / "loras")
    bench.bake(base, tmp_path / "loras", 8, tmp_path / "job")
    (found,) = load_file(tmp_path / "job/out/base.safetensors").values()
    assert found.dtype == torch.float16
    assert float(found.abs().max()) > 0


@pytest.fixture
def files(bench, tmp_path, monkeypatch):
    """A base of three tensors, and two fine-tunes of it: the fine-tunes first."""
    import torch
    from safetensors.torch import save_file

    monkeypatch.setattr(bench, "POOL", 1 << 16)
    monkeypatch.setattr(bench, "SAMPLED", 1)
    shapes = {"conv_in.weight": (64, 4, 3, 3), "down_blocks.0.to_q.weight": (256, 320), "conv_in.bias": (64,)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two", "base")]
    save_file({name: tensor.half() for name, tensor in tensors.items()}, files[-1], {"format": "pt"})
    for seed, path in enumerate(files[:-1], 1):
        bench.write_fine_tune(files[-1], path, seed)
    return files


@pytest.mark.parametrize("method", ["average", "differences", "ties"])
@pytest.mark.parametrize("tool", ["modelgrove", "mergekit", "sd-mecha"])
def test_all_merge_the_same_fine_tunes(bench, files, tool, method, tmp_path):
    work, needs = bench.MIXERS[tool]
    for name in needs:
        pytest.importorskip(name)
    work(files, method, tmp_path / "job")
    error = bench.error_of_mix(files, method, tmp_path / "job")
    # Rounding to float16 of weights ten times as large as what changed. Of differences between halves many are equal,
    # and which of those at the threshold TIES keeps is free.
    assert 0 < error < (0.1 if method == "ties" else 0.01)
