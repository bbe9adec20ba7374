import numpy as np
import pytest

from modelgrove_hub.registry.kinship import RELATED, UNRELATED, Weights


def network(seed, count=30, size=4096):
    """Samples of `count` matrices, as `read_weights` keeps them."""
    values = np.random.default_rng(seed).normal(size=(count, 64)).astype(np.float32)
    return {(f"layer{number}", size): row for number, row in enumerate(values)}


def weights(samples):
    centred = {key: values - values.mean() for key, values in samples.items()}
    return Weights({key: values / np.linalg.norm(values) for key, values in centred.items()})


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_is_left_of_the_start_is_what_is_told(share):
    """A network that moved by `share` of its own size in random directions keeps 1/√(1 + share²)."""
    start, more = network(1), network(2)
    moved = {key: values + share * more[key] for key, values in start.items()}
    found = weights(start).correlation(weights(moved))
    # 30 · 64 samples: a deviation of 0.023.
    assert found == pytest.approx(1 / (1 + share**2) ** 0.5, abs=0.1)
    assert found > RELATED


def test_strangers_do_not_correlate_whatever_the_names_say():
    one, other = weights(network(1)), weights(network(2))
    assert abs(one.correlation(other)) < UNRELATED
    renamed = weights({(f"other{number}", size): row for number, ((_, size), row) in enumerate(network(2).items())})
    assert one.correlation(renamed) < RELATED  # the best of 30 · 30 pairs are alike by chance


def test_a_network_under_other_names_is_known_by_its_values():
    samples = network(1)
    renamed = {(f"model.{len(samples) - n}", key[1]): row for n, (key, row) in enumerate(samples.items())}
    assert weights(samples).correlation(weights(renamed)) == pytest.approx(1, abs=1e-5)  # float32


def test_large_matrices_count_for_more():
    ours, theirs = network(1, count=4, size=10**6), network(2, count=4, size=100)
    strange = network(3, count=4, size=100)
    found = weights({**ours, **theirs}).correlation(weights({**ours, **strange}))
    assert found > 0.99


def test_a_few_samples_decide_nothing():
    one = weights(network(1, count=1))
    assert one.correlation(one) is None
