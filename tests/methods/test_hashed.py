"""Numbers by hashing: splitmix64's own, spread as they should be, and different ones different."""

import torch

from sparse_lora_dist.methods.shared.hashed_random import distinct, hashes, stratified, uniform

CPU = torch.device("cpu")


def test_hashes_are_splitmix64s() -> None:
    # Of the reference implementation (prng.di.unimi.it/splitmix64.c) from seed 0.
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [number % 2**64 for number in hashes(3, 0, CPU).tolist()] == wanted


def test_uniform_numbers_fill_their_interval_evenly() -> None:
    u = uniform((500, 2000), 3.0, 7, CPU)
    assert u.dtype == torch.float32 and -3.0 <= u.min() < -2.999 and 2.999 < u.max() < 3.0
    assert abs(float(u.mean())) < 0.01 and abs(float(u.var()) - 3.0) < 0.01
    assert abs(float((u[:, 1:] * u[:, :-1]).mean())) < 0.01, "neighbours know nothing of each other"
    other = uniform((500, 2000), 3.0, 8, CPU)
    assert abs(float((u * other).mean())) < 0.01, "nor do seeds"
    assert torch.equal(uniform((10,), 3.0, 7, CPU), u.flatten()[:10])


def test_distinct_numbers_are_in_range_and_all_are_as_likely() -> None:
    drawn = [distinct(5, 20, seed, CPU) for seed in range(400)]
    for numbers in drawn:
        assert len(set(numbers.tolist())) == 5
        assert torch.equal(numbers, numbers.sort().values)
        assert 0 <= numbers[0] and numbers[-1] < 20
    counts = torch.cat(drawn).bincount(minlength=20)
    assert counts.min() > 60 and counts.max() < 140, "100 each, but for chance"
    assert distinct(20, 20, 3, CPU).tolist() == list(range(20))


def test_stratified_numbers_are_one_of_each_part() -> None:
    for count, below in ((7, 50), (1, 3), (13, 13), (1000, 2**40)):
        numbers = stratified(count, below, 3, CPU)
        edges = [i * below // count for i in range(count + 1)]
        assert all(a <= n < b for a, n, b in zip(edges, numbers.tolist(), edges[1:], strict=False))
    drawn = torch.cat([stratified(7, 50, seed, CPU) for seed in range(2000)])
    assert drawn.bincount(minlength=50).min() > 200, "2000 in parts of 7 or 8: 250 each"
