"""Seeds: the same for the same purpose, unrelated for neighbours."""

import itertools

from cl_merge.seeds import derive_seed


def test_neighbours_never_collide_and_every_bit_varies():
    seeds = {derive_seed(*parts) for parts in itertools.product(range(20), repeat=3)}
    assert len(seeds) == 20**3
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    for bit in range(64):
        share = sum(seed >> bit & 1 for seed in seeds) / len(seeds)
        assert 0.45 < share < 0.55


def test_order_and_number_of_parts_matter():
    assert len({derive_seed(), derive_seed(0), derive_seed(0, 0), derive_seed(0, 1)}) == 4
    assert derive_seed(1, 0) != derive_seed(0, 1)
