import math

import numpy as np
import pytest
import torch
from monai.transforms import Compose

from monai_deqkan.operators import FourierOperator
from monai_deqkan.transforms import EstimateSensitivityMapsd, SimulateKspace, SimulateKspaced


def image(*space, seed=0):
    return torch.rand(1, *space, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("space", [(12, 9), (8, 6, 5)])
@pytest.mark.parametrize("coils", [1, 5])
def test_without_noise_the_root_sum_of_squares_is_the_image(space, coils):
    kspace = SimulateKspace(coils)(image(*space), seed=0)
    assert kspace.shape == (coils, *space)
    rss = FourierOperator(len(space)).adjoint(kspace).abs().square().sum(0, keepdim=True).sqrt()
    torch.testing.assert_close(rss, image(*space), rtol=1e-4, atol=1e-5)


def test_phase_stays_within_its_limit_and_is_not_flat():
    x = FourierOperator(2).adjoint(SimulateKspace(1, max_phase=1.0)(image(16, 16) + 0.1, seed=0))
    phase = x.angle().abs()
    assert float(phase.max()) == pytest.approx(1.0, abs=1e-3)
    assert float(phase.min()) < 0.5


def test_tissues_differ_in_phase_and_nothing_else_does():
    x = torch.full((1, 16, 16), 0.2)
    x[:, 4:12, 4:10] = 1.0
    x[:, 12:, 12:] = 0.0
    plain, shifted = (
        FourierOperator(2).adjoint(SimulateKspace(1, tissue_phase=size)(x, seed=0))[0] for size in (0.0, 3.0)
    )
    torch.testing.assert_close(shifted.abs(), plain.abs())
    change = (shifted * plain.conj()).angle()
    bright, middle = change[x[0] == 1], change[x[0] == 0.2]
    assert float(bright.std()) < 1e-3
    assert float(middle.std()) < 1e-3
    assert 0.1 < float((bright.mean() - middle.mean()).abs()) <= 3.0


@pytest.mark.parametrize("snr_db", [10, (10, 20)])
def test_noise_has_a_ratio_in_the_range(snr_db):
    clean = SimulateKspace(4)(image(48, 48), seed=3)
    noise = SimulateKspace(4, snr_db=snr_db)(image(48, 48), seed=3) - clean
    # Drawn after phase and coils, so the signal is the same; the ratio is power over power.
    ratio = 10 * math.log10(clean.abs().square().sum() / noise.abs().square().sum())
    low, high = (snr_db, snr_db) if isinstance(snr_db, int) else snr_db
    assert low - 0.3 <= ratio <= high + 0.3


def test_draws_differ_unless_seeded_or_tied_to_the_item():
    x = image(8, 8)
    draw = SimulateKspace(2)
    assert torch.equal(draw(x, seed=1), draw(x, seed=1))
    first, again = (Compose([SimulateKspaced(num_coils=2)]).set_random_state(5) for _ in range(2))
    drawn = [first({"image": x})["kspace"] for _ in range(2)]
    assert not torch.equal(*drawn)
    assert all(torch.equal(again({"image": x})["kspace"], one) for one in drawn)
    tied = SimulateKspaced(num_coils=2, item_seed=0)
    items = [tied({"image": x, "source": source, "slice": i}) for source, i in (("a/x", 0), ("b/x", 0), ("a/x", 1))]
    assert torch.equal(items[0]["kspace"], items[1]["kspace"])
    assert not torch.equal(items[0]["kspace"], items[2]["kspace"])
    assert items[0]["simulated"] is True


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SimulateKspace()(-image(4, 4)), "not be negative"),
        (lambda: SimulateKspace()(image(4, 4) * np.nan), "finite"),
        (lambda: SimulateKspace()(image(4, 4).expand(3, -1, -1)), r"\(1, \*space\)"),
        (lambda: SimulateKspace(snr_db=(1, 2, 3)), "range of two"),
        (lambda: SimulateKspace(snr_db=(20, 10)), "smaller first"),
        (lambda: SimulateKspace(0), "num_coils"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_of_coils_are_drawn_and_one_of_them_changes_nothing():
    simulate = SimulateKspace((1, 3, 6), snr_db=30).set_random_state(0)
    counts = {len(simulate(image(8, 8))) for _ in range(30)}
    assert counts == {1, 3, 6}
    assert torch.equal(SimulateKspace([4])(image(8, 8), seed=5), SimulateKspace(4)(image(8, 8), seed=5))
    with pytest.raises(ValueError, match="num_coils"):
        SimulateKspace(())


def test_the_same_kspace_without_noise_is_kept_by_choice():
    item = {"image": image(8, 6), "source": "a.png", "slice": 0}
    noisy = SimulateKspaced(num_coils=2, snr_db=10, clean_key="clean", item_seed=0)(item)
    power, noise = noisy["clean"].abs().square().mean(), (noisy["kspace"] - noisy["clean"]).abs().square().mean()
    assert float(10 * torch.log10(power / noise)) == pytest.approx(10, abs=2)
    rss = FourierOperator(2).adjoint(noisy["clean"]).abs().square().sum(0, keepdim=True).sqrt()
    torch.testing.assert_close(rss, image(8, 6), rtol=1e-4, atol=1e-5)
    quiet = SimulateKspaced(num_coils=2, clean_key="clean", item_seed=0)(item)
    assert torch.equal(quiet["kspace"], quiet["clean"])


def test_the_simulated_maps_are_kept_by_choice_and_not_estimated_again():
    item = {"image": image(8, 6), "source": "a.png", "slice": 0}
    made = SimulateKspaced(num_coils=3, max_phase=0.0, maps_key="maps", item_seed=0)(item)
    coil_images = FourierOperator(2).adjoint(made["kspace"])
    torch.testing.assert_close(coil_images, made["maps"] * image(8, 6), rtol=1e-4, atol=1e-5)
    kept = EstimateSensitivityMapsd(maps_key="maps", replace=False)(made)
    assert torch.equal(kept["maps"], made["maps"])
    assert not torch.equal(EstimateSensitivityMapsd(maps_key="maps")(made)["maps"], made["maps"])
