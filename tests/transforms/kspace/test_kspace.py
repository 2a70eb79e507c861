import h5py
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose

from monai_deqkan.metrics import psnr
from monai_deqkan.operators import (
    MASKS,
    CoilOperator,
    FourierOperator,
    espirit_maps,
    infer_mask,
    net_acceleration,
    simulate_kspace,
    smooth_coil_maps,
    smooth_phase,
)
from monai_deqkan.transforms.kspace import (
    CropCoilImages,
    CropCoilImagesd,
    EstimateSensitivityMaps,
    EstimateSensitivityMapsd,
    ImageMagnitude,
    ImageMagnituded,
    LoadKspaceSlice,
    LoadKspaceSliced,
    MaskKspace,
    MaskKspaced,
    NormalizeKspace,
    NormalizeKspaced,
    ReferenceImage,
    ReferenceImaged,
    UndersampleKspace,
    UndersampleKspaced,
    kspace_file_shape,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def disc(height=40, width=36):
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return (x**2 + y**2 < 0.6) * (1 + 0.5 * torch.cos(6 * x + 3 * y))


def simulated(coils=6, height=40, width=36):
    maps = smooth_coil_maps((height, width), coils, generator=seeded())
    phase = smooth_phase((height, width), 1.0, generator=seeded())
    return simulate_kspace(100 * disc(height, width)[None], maps, phase=phase)[0]


def write(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
    return path


@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (3, 6, 5)])
def test_load_reads_one_slice_and_adds_a_missing_coil_axis(tmp_path, shape):
    data = torch.randn(*shape, dtype=torch.complex64, generator=seeded()).numpy()
    path = write(tmp_path / "a.h5", kspace=data)
    expected = data[1] if len(shape) == 4 else data[1][None]
    assert kspace_file_shape(path) == (3, *expected.shape)
    got = LoadKspaceSlice()(path, 1)
    assert got.dtype == torch.complex64
    np.testing.assert_array_equal(got.numpy(), expected)
    item = LoadKspaceSliced()({"kspace": str(path), "slice": 1})
    np.testing.assert_array_equal(item["kspace"].numpy(), expected)
    assert item["source"] == str(path)


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"image": np.ones(3)}, "data set 'kspace'"),
        ({"kspace": np.ones((2, 3, 4, 5))}, "must be complex"),
        ({"kspace": np.ones((4, 5), complex)}, r"\(slices, coils, H, W\)"),
        ({"kspace": np.ones((1, 1, 2, 4, 5), complex)}, "missing axis"),
        ({"kspace": np.full((1, 2, 4, 5), np.nan, complex)}, "NaN"),
        ({"kspace": np.ones((1, 2, 4, 5), complex)}, "slices 0 to 0"),
    ],
)
def test_load_refuses_bad_files(tmp_path, datasets, message):
    path = write(tmp_path / "a.h5", **datasets)
    with pytest.raises(ValueError, match=message):
        LoadKspaceSlice()(path, 1 if "0 to" in message else 0)


def test_several_map_sets_of_a_scan_and_of_an_empty_slice():
    kspace = simulated()
    estimate = EstimateSensitivityMapsd(method="espirit", num_sets=2, allow_empty=True)
    maps = estimate({"kspace": kspace})["sensitivity_maps"]
    expected = espirit_maps(kspace[None], num_sets=2, crop=0.8)[0]
    torch.testing.assert_close(maps, expected)
    empty = estimate({"kspace": torch.zeros_like(kspace)})["sensitivity_maps"]
    assert empty.shape == maps.shape == (2, *kspace.shape)
    assert estimate({"kspace": kspace[:1]})["sensitivity_maps"].shape == kspace[:1].shape  # one coil has one set


def test_broken_slices_are_zeros_with_a_mark_by_choice(tmp_path, caplog):
    data = np.ones((2, 2, 4, 5), complex)
    data[1, 0, 2, 3] = np.nan
    path = write(tmp_path / "a.h5", kspace=data)
    load = LoadKspaceSliced(allow_broken=True)
    whole, broken = (load({"kspace": path, "slice": index}) for index in (0, 1))
    assert not whole["broken"]
    assert bool((whole["kspace"] == 1).all())
    assert broken["broken"]
    assert not broken["kspace"].any()
    assert "Slice 1 of" in caplog.text


def test_load_refuses_what_is_no_hdf5_and_items_without_slice(tmp_path):
    path = tmp_path / "a.h5"
    path.write_text("not HDF5")
    with pytest.raises(OSError, match="signature"):
        LoadKspaceSlice()(path, 0)
    with pytest.raises(KeyError, match="'slice'"):
        LoadKspaceSliced()({"kspace": path})


@pytest.mark.parametrize("size", [(20, 18), (21, -1), (17, 17), (50, 10)])
def test_crop_keeps_the_centre_of_the_images(size):
    kspace = simulated()
    fourier = FourierOperator(2)
    images, got = fourier.adjoint(kspace), fourier.adjoint(CropCoilImages(size)(kspace))
    wanted = [n if s == -1 else min(s, n) for s, n in zip(size, (40, 36), strict=True)]
    rows, columns = (slice(n // 2 - w // 2, n // 2 - w // 2 + w) for n, w in zip((40, 36), wanted, strict=True))
    torch.testing.assert_close(got, images[:, rows, columns], rtol=1e-4, atol=1e-3)
    item = CropCoilImagesd(spatial_size=size)({"kspace": kspace})
    torch.testing.assert_close(item["kspace"], CropCoilImages(size)(kspace))


def test_crop_refuses_missing_lines_but_not_zero_padding():
    kspace = simulated()
    undersampled, _ = UndersampleKspace(2, 0.2)(kspace, seed=0)
    with pytest.raises(ValueError, match="Crop before"):
        CropCoilImages((20, 20))(undersampled)
    cropped = CropCoilImages((20, -1))(undersampled)
    assert cropped.shape == (6, 20, 36)
    assert torch.equal(infer_mask(cropped[None]), infer_mask(undersampled[None]))
    assert CropCoilImages((-1, -1))(undersampled) is undersampled  # no rounding in lines that were not measured
    kspace[..., :4] = 0
    assert CropCoilImages((20, 20))(kspace).shape == (6, 20, 20)


@pytest.mark.parametrize("pattern", ["equispaced", "random", "gaussian"])
def test_undersampling_zeroes_all_but_the_mask(pattern):
    kspace = simulated()
    got, mask = UndersampleKspace(3, 0.1, pattern=pattern)(kspace, seed=3)
    assert mask.shape == (1, 1, 36)
    assert mask.dtype == torch.bool
    assert net_acceleration(mask) == pytest.approx(3)
    assert torch.equal(got, kspace * mask)
    assert torch.equal(infer_mask(got[None])[0], mask)
    volume, mask = UndersampleKspace(2, 0.25, pattern=pattern)(torch.ones(1, 3, 4, 8, dtype=torch.complex64))
    assert mask.shape == (1, 1, 1, 8)
    assert int((volume != 0).sum()) == 3 * 4 * 4


@pytest.mark.parametrize("pattern", sorted(MASKS))
def test_every_pattern_is_the_mask_function_of_its_name(pattern):
    kspace = simulated()
    got, mask = UndersampleKspace(2.5, 0.2, pattern=pattern)(kspace, seed=11)
    generator = torch.Generator().manual_seed(11)
    torch.randint(1, (), generator=generator)  # which of the accelerations
    assert torch.equal(mask[0], MASKS[pattern]((40, 36), 2.5, 0.2, generator=generator))
    assert torch.equal(got, kspace * mask)
    assert net_acceleration(mask) == pytest.approx(2.5, rel=0.05)


@pytest.mark.parametrize("shape", [(36,), (1, 36), (40, 36), (1, 40, 36), (6, 40, 36)])
def test_a_given_mask_is_applied_whatever_its_axes(shape):
    kspace = simulated()
    mask = (torch.rand(shape, generator=seeded()) > 0.5).numpy()
    got, used = MaskKspace()(kspace, mask)
    np.testing.assert_allclose(got.numpy(), kspace.numpy() * mask)
    item = MaskKspaced()({"kspace": kspace, "mask": mask})
    assert torch.equal(item["kspace"], got)
    assert torch.equal(item["mask"], used)
    assert torch.equal(MaskKspaced(mask=mask)({"kspace": kspace})["kspace"], got)
    assert used.ndim == 3


def test_maps_by_name():
    kspace, mask = UndersampleKspace(2, 0.4)(simulated(), seed=0)
    got = EstimateSensitivityMapsd(method="espirit")({"kspace": kspace, "mask": mask})["sensitivity_maps"]
    assert torch.equal(got, espirit_maps(kspace[None], mask[None])[0])
    exact = smooth_coil_maps((40, 36), 6, generator=seeded())
    agreement = (got.conj() * exact).sum(0).abs()[disc() > 0]
    assert float(agreement.median()) > 0.99


def test_undersampling_draws_anew_unless_seeded():
    kspace = simulated()
    transform = UndersampleKspace([3, 6], [0.1, 0.05], pattern="random").set_random_state(0)
    masks = [transform(kspace)[1] for _ in range(20)]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 10
    assert {round(net_acceleration(mask)) for mask in masks} == {3, 6}
    again = UndersampleKspace([3, 6], [0.1, 0.05], pattern="random").set_random_state(0)
    assert all(torch.equal(again(kspace)[1], mask) for mask in masks)
    assert torch.equal(transform(kspace, seed=5)[1], transform(kspace, seed=5)[1])


def test_item_seed_ties_the_mask_to_file_name_and_slice():
    kspace = simulated()

    def mask_of(source, index, seed=0):
        transform = UndersampleKspaced(accelerations=3, center_fractions=0.1, pattern="random", item_seed=seed)
        return tuple(transform({"kspace": kspace, "source": source, "slice": index})["mask"].flatten().tolist())

    assert mask_of("a/x.h5", 0) == mask_of("b/x.h5", 0)
    others = [mask_of("a/y.h5", 0), mask_of("a/x.h5", 1), mask_of("a/x.h5", 0, seed=1)]
    assert len({mask_of("a/x.h5", 0), *others}) == 4
    with pytest.raises(KeyError, match="source"):
        UndersampleKspaced(item_seed=0)({"kspace": kspace})


def test_random_masks_of_the_dictionary_form_follow_set_random_state():
    kspace = simulated()
    first, again = (
        Compose([UndersampleKspaced(accelerations=3, center_fractions=0.1, pattern="random")]).set_random_state(7)
        for _ in range(2)
    )
    masks = [first({"kspace": kspace})["mask"] for _ in range(5)]
    assert all(torch.equal(again({"kspace": kspace})["mask"], mask) for mask in masks)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 5


def test_reference_is_the_combination_of_the_coil_images():
    kspace = simulated()
    image, rss = ReferenceImage()(kspace)
    torch.testing.assert_close(rss[0], 100 * disc(), rtol=1e-4, atol=1e-3)
    maps = EstimateSensitivityMaps()(kspace)
    combined = (maps.conj() * FourierOperator(2).adjoint(kspace)).sum(0)
    torch.testing.assert_close(image, torch.stack((combined.real, combined.imag)))
    # Close to the root sum of squares, and never above it.
    assert psnr(combined.abs()[None, None], rss[None]) > 30
    assert bool((combined.abs() <= rss[0] * (1 + 1e-5)).all())
    exact = smooth_coil_maps((40, 36), 6, generator=seeded())
    image, _ = ReferenceImage()(kspace, exact)
    phase = smooth_phase((40, 36), 1.0, generator=seeded())
    expected = torch.polar(100 * disc(), phase)
    torch.testing.assert_close(torch.complex(image[0], image[1]), expected, rtol=1e-4, atol=1e-3)


def test_single_coil_reference_keeps_its_phase():
    kspace = simulated()[:1]
    image, rss = ReferenceImage()(kspace)
    expected = FourierOperator(2).adjoint(kspace)[0]
    torch.testing.assert_close(torch.complex(image[0], image[1]), expected)
    torch.testing.assert_close(rss[0], expected.abs())


@pytest.mark.parametrize("percentile", [100.0, 99.0, 50.0])
def test_normalization_is_a_scale_that_fixes_the_percentile(percentile):
    kspace = 1e-6 * torch.randn(3, 21, 20, dtype=torch.complex64, generator=seeded())
    scaled, scale = NormalizeKspace(percentile)(kspace)
    rss = FourierOperator(2).adjoint(scaled).abs().square().sum(0).sqrt().numpy()
    assert np.percentile(rss, percentile, method="nearest") == pytest.approx(1.0, rel=0.01)
    torch.testing.assert_close(scaled * scale, kspace)
    torch.testing.assert_close(NormalizeKspace(percentile)(7 * kspace)[0], scaled)
    with pytest.raises(ValueError, match="hold a signal"):
        NormalizeKspace(percentile)(torch.zeros_like(kspace))


def test_an_empty_slice_is_left_as_it_is_where_that_is_allowed():
    item = {"kspace": torch.zeros(2, 6, 8, dtype=torch.complex64), "image": torch.zeros(2, 6, 8)}
    found = NormalizeKspaced(allow_empty=True)(item)
    assert found["scale"] == 1
    assert not found["kspace"].any()
    assert not found["image"].any()


def test_magnitude_of_two_channels():
    image = torch.tensor([3.0, 4.0]).reshape(2, 1, 1)
    assert ImageMagnitude()(image).item() == 5
    assert ImageMagnituded(["a"])({"a": image})["a"].shape == (1, 1, 1)


def test_training_chain_is_consistent(tmp_path):
    kspace = simulated()
    path = write(tmp_path / "a.h5", kspace=torch.stack([kspace, 2 * kspace]).numpy())
    chain = Compose(
        [
            LoadKspaceSliced(),
            CropCoilImagesd(spatial_size=(32, -1)),
            ReferenceImaged(),
            UndersampleKspaced(accelerations=2, center_fractions=0.2, item_seed=0),
            NormalizeKspaced(),
            EstimateSensitivityMapsd(),
        ]
    )
    items = [{"kspace": str(path), "slice": index} for index in range(2)]
    batch = next(iter(DataLoader(Dataset(items, chain), batch_size=2)))
    assert batch["kspace"].shape == batch["sensitivity_maps"].shape == (2, 6, 32, 36)
    assert batch["image"].shape == (2, 2, 32, 36)
    assert batch["reference_rss"].shape == (2, 1, 32, 36)
    assert torch.equal(infer_mask(batch["kspace"]), batch["mask"])
    # Twice the signal is twice the scale, and the same item otherwise where the masks agree.
    full = CropCoilImages((32, -1))(kspace)
    for index in range(2):
        restored = batch["kspace"][index] * batch["scale"][index]
        torch.testing.assert_close(restored, (index + 1) * full * batch["mask"][index], rtol=1e-4, atol=1e-2)
        rss = FourierOperator(2).adjoint(full).abs().square().sum(0).sqrt() * (index + 1)
        torch.testing.assert_close(batch["reference_rss"][index, 0] * batch["scale"][index], rss, rtol=1e-4, atol=1e-2)
    # The forward model explains the data by the target, up to the maps.
    target = torch.complex(batch["image"][:, 0], batch["image"][:, 1])
    predicted = FourierOperator(2)(CoilOperator(batch["sensitivity_maps"])(target)) * batch["mask"]
    assert (predicted - batch["kspace"]).norm() < 0.1 * batch["kspace"].norm()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: UndersampleKspace([4, 8], [0.08]), "equally long"),
        (lambda k: UndersampleKspace(pattern="spiral"), "pattern"),
        (lambda k: UndersampleKspace()(k[0]), "coil axis"),
        (lambda k: NormalizeKspace(0.0), "percentile"),
        (lambda k: CropCoilImages((20,))(k), "does not fit"),
        (lambda k: ReferenceImage()(k.real), "complex"),
        (lambda k: NormalizeKspaced(["a", "b"]), "one key"),
        (lambda k: ImageMagnitude()(k.real), "channels"),
        (lambda k: MaskKspace()(k, torch.zeros(36)), "keep some measured samples"),
        (lambda k: UndersampleKspace()(torch.zeros_like(k)), "keep some measured samples"),
        (lambda k: MaskKspace()(k, torch.ones(35)), "must broadcast"),
        (lambda k: MaskKspace()(k, torch.ones(1, 1, 1, 36)), "must broadcast"),
        (lambda k: MaskKspace()(k, torch.full((36,), np.nan)), "finite"),
        (lambda k: MaskKspaced()({"kspace": k}), "needs a `mask`"),
        (lambda k: ReferenceImage()(k, torch.ones(6, 20, 18, dtype=k.dtype)), "after the same crop"),
        (lambda k: ReferenceImage()(k, torch.ones(5, 40, 36, dtype=k.dtype)), "after the same crop"),
        (lambda k: EstimateSensitivityMaps(8, method="espirit"), "num_center_lines"),
        (lambda k: EstimateSensitivityMaps(method="walsh"), "method"),
        (lambda k: EstimateSensitivityMaps(num_sets=2), "espirit"),
        (lambda k: EstimateSensitivityMaps(method="espirit", num_sets=0), "num_sets"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(simulated())


def test_several_patterns_are_drawn_from():
    kspace = torch.ones(1, 4, 64, dtype=torch.complex64)
    transform = UndersampleKspace(4, 0.1, pattern=("random", "equispaced")).set_random_state(0)
    masks = [transform(kspace)[1][0, 0] for _ in range(40)]
    gaps = [mask[:24].nonzero()[:, 0].diff() for mask in masks]
    equal = sum(bool((gap == gap[0]).all()) for gap in gaps if len(gap) > 2)
    assert 8 < equal < 32
    alone = [UndersampleKspace(4, 0.1, pattern=pattern)(kspace, seed=2)[1] for pattern in ("random", ["random"])]
    assert torch.equal(*alone)
    for bad in (("random", "spiral"), ()):
        with pytest.raises(ValueError, match="pattern"):
            UndersampleKspace(pattern=bad)
