"""The mark's mathematics against dense references, and its false positives by counting."""

import hashlib
import hmac
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import binom

from modelgrove_kernels.lowrank import LowRank
from modelgrove_kernels.weight_mark import (
    Carriers,
    MarkKey,
    Reading,
    amounts,
    dithered,
    lifts,
    log10,
    marked_updates,
    relative_change,
    rms,
    signs,
    smallest_margin,
    statistic_of,
    tail,
    threshold,
)

KEY = MarkKey(hashlib.sha256(b"a key").digest())
OTHER = MarkKey(hashlib.sha256(b"another key").digest())
SHAPES = {"a": (48, 80), "b": (96, 40), "c": (33, 130)}


def matrices(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": 0.1, "b": 3.0, "c": 0.02}
    return {name: torch.randn(shape, generator=generator) * sizes[name] * scale for name, shape in SHAPES.items()}


def products(seed=0, rank=6):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    return {name: LowRank(draw(rows, rank), draw(rank, columns)) for name, (rows, columns) in SHAPES.items()}


def marked(weights, margin=4.0, key=KEY):
    before = statistic_of(key, weights)
    gram = torch.stack([key.carriers(name, tuple(weight.shape)).gram() for name, weight in weights.items()]).sum(0)
    given = amounts(before.values(), key.message(), gram, before.size, margin)
    changed = {name: key.carriers(name, tuple(weight.shape)).added(weight, given) for name, weight in weights.items()}
    return changed, relative_change(given * math.sqrt(before.size), gram, before.size)


def dense(key, weights):
    """s by its definition, in float64."""
    total, size = np.zeros(key.bits), 0
    for name, weight in weights.items():
        if isinstance(weight, LowRank):
            weight = weight.up.double() @ weight.down.double()
        T, carriers = weight.double().numpy(), key.carriers(name, tuple(weight.shape))
        u, v = carriers.left.double().numpy(), carriers.right.double().numpy()
        total += np.einsum("ir,rc,ic->i", u, T / np.sqrt((T**2).mean()), v)
        size += T.size
    return total / math.sqrt(size)


def reading(key, weights):
    return Reading.of(statistic_of(key, weights).values(), key.message())


class TestKeys:
    def test_a_carrier_is_the_hmac_of_its_purpose_stretched(self):
        """Computed from the words of the docstring: whoever has the secret can do so without our code."""
        purpose = b"modelgrove weight mark 1\0" + b"u\0unet_conv_in\x0040x24"
        stream = hashlib.shake_256(hmac.new(KEY.secret, purpose, hashlib.sha256).digest()).digest(128 * 5)
        expected = np.unpackbits(np.frombuffer(stream, np.uint8).reshape(128, 5), axis=1) * 2.0 - 1
        assert np.array_equal(KEY.carriers("unet_conv_in", (40, 24)).left.numpy(), expected)

    @given(st.binary(min_size=32, max_size=32), st.integers(1, 40), st.integers(1, 40), st.integers(1, 60))
    @settings(max_examples=40, deadline=None)
    def test_signs_are_signs_and_fewer_bits_begin_alike(self, secret, rows, columns, bits):
        few, many = MarkKey(secret, bits), MarkKey(secret, bits + 9)
        short, long = few.carriers("layer", (rows, columns)), many.carriers("layer", (rows, columns))
        assert short.left.shape == (bits, rows)
        assert short.right.shape == (bits, columns)
        assert torch.equal(short.left.abs(), torch.ones(bits, rows))
        assert torch.equal(long.left[:bits], short.left)
        assert torch.equal(many.message()[:bits], few.message())

    def test_name_shape_side_and_secret_all_matter(self):
        first = KEY.carriers("x", (64, 64))
        others = [
            KEY.carriers("y", (64, 64)).left, first.right, OTHER.carriers("x", (64, 64)).left,
            KEY.carriers("x", (64, 65)).left,
        ]  # fmt: skip
        for other in others:
            # 8,192 coins: four standard deviations are 0.044.
            assert abs(float((first.left * other).mean())) < 0.05

    def test_the_secret_is_not_shown(self):
        assert KEY.secret.hex() not in repr(KEY)
        assert "secret" not in repr(KEY)

    @pytest.mark.parametrize(("secret", "bits"), [(b"short", 128), (bytes(32), 0)])
    def test_what_is_no_key_is_refused(self, secret, bits):
        with pytest.raises(ValueError, match="32 secret bytes"):
            MarkKey(secret, bits)


class TestStatistic:
    @pytest.mark.parametrize("weights", [matrices(), products()], ids=["dense", "factors"])
    def test_it_is_what_the_definition_says(self, weights):
        # float32 sums of 4,000 products: 1e-4 of a standard deviation.
        assert np.allclose(statistic_of(KEY, weights).values().numpy(), dense(KEY, weights), atol=1e-4)

    def test_scale_has_no_say(self):
        found = statistic_of(KEY, matrices(scale=37.0)).values()
        assert torch.allclose(found, statistic_of(KEY, matrices()).values(), atol=1e-4)

    def test_random_weights_give_unit_variance(self):
        values = torch.cat([statistic_of(KEY, matrices(seed)).values() for seed in range(20)])
        # 2,560 values: the deviation of a sample variance is √(2/2560) = 0.028.
        assert float(values.var()) == pytest.approx(1, abs=0.12)
        assert float(values.mean()) == pytest.approx(0, abs=0.08)

    def test_a_zero_matrix_says_nothing(self):
        weights = matrices()
        with_zero = {**weights, "zero": torch.zeros(20, 20)}
        assert torch.allclose(statistic_of(KEY, with_zero).values(), statistic_of(KEY, weights).values())

    @pytest.mark.parametrize("weight", [matrices()["c"], products()["c"]], ids=["dense", "factors"])
    def test_rms(self, weight):
        formed = weight.up @ weight.down if isinstance(weight, LowRank) else weight
        assert rms(weight) == pytest.approx(float(formed.double().square().mean().sqrt()), rel=1e-5)


class TestGram:
    def test_of_carriers(self):
        key = MarkKey(KEY.secret, 12)
        carriers = key.carriers("x", (10, 14))
        formed = torch.einsum("ir,ic->irc", carriers.left, carriers.right).flatten(1).double()
        assert torch.equal(carriers.gram(), formed @ formed.T)

    def test_of_what_factors_can_reach(self):
        carriers, update = MarkKey(KEY.secret, 12).carriers("a", SHAPES["a"]), products()["a"]
        up, down = torch.linalg.qr(update.up.double()).Q, torch.linalg.qr(update.down.double().T).Q
        left, right = torch.eye(48).double() - up @ up.T, torch.eye(80).double() - down @ down.T
        formed = torch.einsum("ir,ic->irc", carriers.left, carriers.right).double()
        reached = (formed - left @ formed @ right).flatten(1)
        # float32 bases; entries are up to 3,840.
        assert torch.allclose(carriers.tangent_gram(update), reached @ reached.T, atol=0.05)


class TestSmallestChange:
    def test_it_solves_the_quadratic_programme(self):
        """min ‖x‖² subject to bᵢ⟨Cᵢ, x⟩ ≥ m − bᵢsᵢ, by another solver on x itself."""
        generator = torch.Generator().manual_seed(3)
        C = torch.randn(6, 15, generator=generator).double()
        s, b = torch.randn(6, generator=generator).double() * 2, torch.tensor([1.0, -1, 1, 1, -1, -1])
        found = (lifts(s, b, C @ C.T, 1.5) * b.double()) @ C
        A, least = (C * b[:, None]).numpy(), (1.5 - b.double() * s).numpy()
        right = minimize(
            lambda x: x @ x, np.zeros(15), jac=lambda x: 2 * x, method="SLSQP", options={"ftol": 1e-12},
            constraints={"type": "ineq", "fun": lambda x: A @ x - least, "jac": lambda x: A},
        ).x  # fmt: skip
        # `lifts` stops at a thousandth of the margin.
        assert np.linalg.norm(found.numpy() - right) < 5e-3 * np.linalg.norm(right)

    def test_bits_that_are_strong_by_chance_are_left_alone(self):
        found = lifts(torch.tensor([5.0, 0.0]).double(), torch.ones(2), torch.eye(2).double(), 4.0)
        assert found.tolist() == [0.0, 4.0]

    def test_what_does_not_fit_is_refused(self):
        gram = torch.ones(2, 2).double()  # one direction, wanted both ways
        with pytest.raises(ValueError, match="do not fit"):
            lifts(torch.zeros(2).double(), torch.tensor([1.0, -1.0]), gram, 4.0)

    def test_all_bits_reach_the_margin_and_the_change_is_as_foretold(self):
        weights = matrices()
        changed, foretold = marked(weights)
        assert smallest_margin(statistic_of(KEY, changed).values(), KEY.message()) == pytest.approx(4, rel=0.02)
        moved = sum(
            float((changed[name] - weight).square().sum()) / rms(weight) ** 2 for name, weight in weights.items()
        )
        size = sum(weight.numel() for weight in weights.values())
        assert math.sqrt(moved / size) == pytest.approx(foretold, rel=1e-3)
        for name, weight in weights.items():  # the same share of each
            assert float((changed[name] - weight).norm() / weight.norm()) == pytest.approx(foretold, rel=0.2)

    def test_its_size_follows_the_law(self):
        """ρ ≈ √(n / D) √(m² + 1), which docs/trust.md states."""
        weights = {
            f"{place}": torch.randn(200, 300, generator=torch.Generator().manual_seed(place)) for place in range(4)
        }
        _, change = marked(weights)
        assert change == pytest.approx(math.sqrt(128 / 240_000) * math.sqrt(17), rel=0.05)

    def test_the_change_in_factors_is_the_product_of_what_was_asked(self):
        carriers, update = MarkKey(KEY.secret, 16).carriers("a", SHAPES["a"]), products()["a"]
        given = torch.randn(16, generator=torch.Generator().manual_seed(0)).double() * 1e-4
        found = carriers.added_low_rank(update, given)
        pattern = rms(update) * (carriers.left.T * given.float()) @ carriers.right
        up, down = torch.linalg.qr(update.up).Q, torch.linalg.qr(update.down.T).Q
        reached = pattern - (pattern - up @ (up.T @ pattern)) @ (torch.eye(80) - down @ down.T)
        right = update.up @ update.down + reached
        # Cutting back to the rank loses terms of second order.
        assert float((found.up @ found.down - right).norm()) < 1e-2 * float(reached.norm())
        assert found.rank == update.rank


class TestProducts:
    def test_a_mark_in_the_product_survives_a_change_of_gauge_and_one_in_a_does_not(self):
        key, updates = MarkKey(KEY.secret, 32), products()
        changed = marked_updates(key, updates, 4.0)
        turns = torch.eye(6).roll(1, 0)  # the same directions in another order
        turned = {name: LowRank(one.up @ turns.T, turns @ one.down) for name, one in changed.items()}
        assert reading(key, turned).agreeing == 32
        in_a, _ = marked({name: one.down for name, one in updates.items()}, 4.0, key)
        assert reading(key, in_a).agreeing == 32
        assert reading(key, {name: turns @ one for name, one in in_a.items()}).p() > 1e-3

    def test_ranks_stay(self):
        changed = marked_updates(KEY, products(), 3.0)
        assert {one.rank for one in changed.values()} == {6}
        assert smallest_margin(statistic_of(KEY, changed).values(), KEY.message()) >= 2.99

    def test_too_many_bits_are_refused(self):
        """Rank 1 on one matrix of 20 × 20 has 39 directions; 128 bits need as many."""
        generator = torch.Generator().manual_seed(0)
        update = LowRank(torch.randn(20, 1, generator=generator), torch.randn(1, 20, generator=generator))
        with pytest.raises(ValueError, match="do not fit"):
            marked_updates(KEY, {"x": update}, 4.0)


class TestTest:
    def test_tails_are_exact(self):
        for bits, least in [(1, 0), (1, 1), (20, 20), (64, 51), (128, 92), (128, 0), (128, 129)]:
            assert float(tail(bits, least)) == pytest.approx(float(binom.sf(least - 1, bits, 0.5)), rel=1e-9, abs=0)
        assert tail(20, 20) == Fraction(1, 2**20)

    @pytest.mark.parametrize(
        ("bits", "one", "million"),
        [(16, None, None), (20, 20, None), (32, 30, None), (48, 41, 47), (64, 51, 59), (128, 92, 103), (256, 167, 184)],
    )
    def test_thresholds(self, bits, one, million):
        assert threshold(bits, 1e-6) == one
        assert threshold(bits, 1e-6, 10**6) == million

    def test_a_threshold_is_the_first_that_is_enough(self):
        least = threshold(128, 1e-6, 5)
        assert float(tail(128, least)) * 5 <= 1e-6 < float(tail(128, least - 1)) * 5

    def test_both_polarities_count(self):
        weights, _ = marked(matrices())
        flipped = reading(KEY, {name: -weight for name, weight in weights.items()})
        assert (flipped.agreeing, flipped.inverted) == (0, True)
        assert flipped.p() == reading(KEY, weights).p() == Fraction(2, 2**128)
        assert flipped.p(2**200) == 1

    def test_small_probabilities_have_a_logarithm(self):
        assert log10(Fraction(1, 2**5000)) == pytest.approx(-5000 * math.log10(2))


class TestFalsePositives:
    def test_a_hundred_thousand_wrong_keys(self):
        """The exact law: at every level as many keys as it says, within the noise of counting, and none at 10⁻⁶.

        The weights hold the mark of another key: that must not matter.
        """
        weights, _ = marked({"x": torch.randn(16, 24, generator=torch.Generator().manual_seed(0))}, 0.5)
        agreeing = []
        for start in range(0, 100_000, 5000):
            secrets = [hashlib.sha256(b"wrong %d" % number).digest() for number in range(start, start + 5000)]
            left, right = signs(secrets, "u\0x", (16, 24), 128, 16), signs(secrets, "v\0x", (16, 24), 128, 24)
            s = Carriers(left.flatten(0, 1), right.flatten(0, 1)).correlations(weights["x"])
            read = torch.where(s >= 0, 1.0, -1.0).view(5000, 128)
            agreeing.append((read == signs(secrets, "message", (), 1, 128)[:, 0]).sum(1))
            first = MarkKey(secrets[0])
            assert reading(first, weights).agreeing == int(agreeing[-1][0])  # what `verify` would say
        agreeing = torch.cat(agreeing).numpy()
        for level in (0.05, 1e-2, 1e-3, 1e-4):
            least = threshold(128, level)
            expected = 1e5 * float(tail(128, least))
            seen = int((agreeing >= least).sum())
            # A Poisson count five deviations off has a chance of 10⁻⁶.
            assert abs(seen - expected) < 5 * math.sqrt(expected) + 3, (level, seen, expected)
        assert agreeing.max() < threshold(128, 1e-6)
        assert (128 - agreeing).max() < threshold(128, 1e-6)

    def test_independent_models_show_nothing(self):
        p = [float(reading(KEY, matrices(seed)).p()) for seed in range(100)]
        # 5 % of 100 are 5, four deviations more are 14.
        assert sum(one <= 0.05 for one in p) <= 14
        assert min(p) > 1e-5

    def test_the_best_of_many_keys_is_nothing_once_they_are_counted(self):
        """R1: whoever may try keys until one fits must count them."""
        weights = matrices()
        keys = [MarkKey(hashlib.sha256(b"tried %d" % number).digest(), 64) for number in range(500)]
        best = min((reading(key, weights) for key in keys), key=lambda one: one.p())
        assert float(best.p()) < 2e-2
        assert float(best.p(len(keys))) > 1e-2


class TestDither:
    def test_a_mark_below_the_steps_of_bfloat16_survives_only_dithered(self):
        generator = torch.Generator().manual_seed(0)
        names = [f"{place}" for place in range(6)]
        weights = {name: torch.randn(1000, 1000, generator=generator).bfloat16() for name in names}
        key = MarkKey(KEY.secret, 32)
        changed, change = marked({name: weight.float() for name, weight in weights.items()}, 2.0, key)
        assert change < 2**-7  # steps of bfloat16 are up to 2⁻⁷ of a value
        noisy = {name: dithered(weight, torch.bfloat16, generator) for name, weight in changed.items()}
        nearest = {name: weight.bfloat16() for name, weight in changed.items()}
        kept = smallest_margin(statistic_of(key, noisy).values(), key.message())
        assert kept > 1.9
        assert kept > smallest_margin(statistic_of(key, nearest).values(), key.message())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_it_is_right_on_average_and_a_neighbour_each_time(self, dtype):
        values = torch.tensor([1.0003, -0.3333, 3e-7, 100.7]).repeat(20_000, 1)
        found = dithered(values, dtype, torch.Generator().manual_seed(0)).double()
        step = torch.finfo(dtype).eps * values[0].abs().double().clamp_min(torch.finfo(dtype).smallest_normal)
        assert bool(((found - values).abs() <= step + 1e-12).all())
        # The mean of 20,000 values within a step deviates by a two-hundredth of it.
        assert bool(((found.mean(0) - values[0]).abs() < 0.02 * step).all())

    def test_wide_types_are_exact(self):
        values = torch.randn(10)
        assert torch.equal(dithered(values, torch.float32, torch.Generator()), values)
