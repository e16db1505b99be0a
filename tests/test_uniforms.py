"""Uniform numbers of the kernels: the published generator, and what a draw asks of it."""

import numpy as np

from rl_buffer.uniforms import fill_uniforms, new_seed, new_seeds


def uniforms_of(seed, num):
    uniforms = np.empty(num)
    fill_uniforms(seed, uniforms)
    return uniforms


def test_the_numbers_are_those_of_splitmix64():
    # The first outputs of the authors' generator for this seed, as every implementation lists them.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert uniforms_of(1234567, 5).tolist() == [(bits >> 11) * 2.0**-53 for bits in published]


def test_as_many_seeds_at_once_are_those_one_after_the_other():
    at_once, singly = np.random.default_rng(3), np.random.default_rng(3)
    seeds = new_seeds(at_once, 5)
    assert seeds.dtype == np.int64
    assert seeds.tolist() == [new_seed(singly) for _ in range(5)]
    assert at_once.bit_generator.state == singly.bit_generator.state
    assert (seeds >= 0).all()


def test_neighbouring_places_and_batches_do_not_depend_on_each_other():
    rng = np.random.default_rng(0)
    batches = np.array([uniforms_of(new_seed(rng), 256) for _ in range(4_000)])
    assert 0.0 <= batches.min() < 1e-5
    assert 1.0 - 1e-5 < batches.max() < 1.0
    num = batches.size
    # Five standard deviations of a mean of `num` numbers, of variance 1/12 and, for products, 1/144.
    assert abs(batches.mean() - 0.5) < 5 * (1 / 12 / num) ** 0.5
    centred = batches - 0.5
    for other in (np.roll(centred, 1, axis=1), np.roll(centred, 1, axis=0)):
        assert abs((centred * other).mean()) < 5 * (1 / 144 / num) ** 0.5
    # In each place of the batch on its own, of which the largest deviation of 256 is below five too.
    assert np.abs(batches.mean(axis=0) - 0.5).max() < 5 * (1 / 12 / len(batches)) ** 0.5


def test_the_numbers_fill_the_interval_evenly():
    num_bins = 64
    rng = np.random.default_rng(1)
    numbers = np.concatenate([uniforms_of(new_seed(rng), 100) for _ in range(1_000)])
    counts = np.bincount((numbers * num_bins).astype(int), minlength=num_bins)
    expected = len(numbers) / num_bins
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # Mean and variance of chi-square are its degrees of freedom and twice these.
    assert abs(chi_square - (num_bins - 1)) < 5 * (2 * (num_bins - 1)) ** 0.5
