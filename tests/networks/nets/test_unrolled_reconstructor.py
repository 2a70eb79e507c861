from __future__ import annotations

import pytest
import torch

from monai_deqkan.networks.layers import frozen_weights
from monai_deqkan.networks.nets import DEQReconstructor, UNetDenoiser, UnrolledReconstructor, WeaklyConvexRidgeDenoiser
from monai_deqkan.operators import equispaced_mask, simulate_kspace, smooth_coil_maps
from monai_deqkan.solvers import FixedPointIteration

FORMS = {"contracting": "ridge", "cg": "unet", "prox": "unet", "grad": "dncnn"}
FORMS["reweighted"] = "weakly_convex_ridge"
SIZES = {"ridge": {"num_layers": 1, "features": 4}, "unet": {"num_layers": 1, "features": (4, 6)}}
SIZES["dncnn"] = {"num_layers": 3, "features": 4}
SIZES["weakly_convex_ridge"] = {"features": (3, 2)}


def scene(shape: tuple[int, ...] = (12, 10), batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, *shape, dtype=torch.complex64, generator=generator)
    maps = smooth_coil_maps(shape, 3, generator=generator)
    mask = equispaced_mask(shape[-1], 2, 0.3, generator=generator).view(*[1] * (len(shape) + 1), -1)
    return simulate_kspace(image, maps) * mask, mask, maps[None]


def build(kind: type, form: str, spatial_dims: int = 2, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    prior = FORMS[form]
    return kind(spatial_dims, prior, form=form, num_cg_steps=2, **SIZES[prior], **settings)


@pytest.mark.parametrize("shape", [(12, 10), (6, 5, 8)])
@pytest.mark.parametrize("form", FORMS)
def test_twin_does_the_picard_steps_of_the_equilibrium(form: str, shape: tuple[int, ...]) -> None:
    data = scene(shape)
    solver = FixedPointIteration(rtol=0.0, max_iter=4, on_failure="ignore")
    equilibrium = build(DEQReconstructor, form, len(shape), solver=solver)
    twin = build(UnrolledReconstructor, form, len(shape), num_steps=3)
    state = {name.replace("equilibrium.cell.", "cell."): value for name, value in equilibrium.state_dict().items()}
    twin.load_state_dict(state)
    # By hand: the inputs of the equilibrium, and the cell applied to them.
    seen = []
    equilibrium.equilibrium.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with torch.no_grad():
        equilibrium(*data)
        cell = equilibrium.equilibrium.cell
        z = cell.initial_state(seen[0])
        for _ in range(3):
            z = cell(z, seen[0])
        unit = twin(*data).flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)
        expected = z * unit.view(-1, *[1] * (z.ndim - 1))
        torch.testing.assert_close(twin(*data), expected, rtol=1e-4, atol=1e-5)
        one = build(UnrolledReconstructor, form, len(shape), num_steps=1)
        one.load_state_dict(state)
        assert float((one(*data) - twin(*data)).abs().max()) > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_changes_memory_and_nothing_else(form: str) -> None:
    data = scene()
    images, gradients, kept = [], [], []
    for checkpointing in (False, True):
        network, saved = build(UnrolledReconstructor, form, num_steps=6, checkpointing=checkpointing), []
        with (
            frozen_weights(network),
            torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t),
        ):
            image = network(*data)
        image.square().sum().backward()
        images.append(image.detach())
        # The energy's level weights are the denoiser's, and no misfit is learned from maps without one.
        unused = ("raw_level_weights", "raw_misfit") if form == "reweighted" else ()
        gradients.append([p.grad for name, p in network.named_parameters() if not name.endswith(unused)])
        kept.append(sum(saved))
    torch.testing.assert_close(images[1], images[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients[0])
    assert kept[1] < 0.6 * kept[0]


def test_memory_kept_grows_with_the_steps() -> None:
    data, kept = scene(), []
    for steps in (3, 6):
        network, saved = build(UnrolledReconstructor, "cg", num_steps=steps), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            network(*data)
        kept.append(sum(saved))
    assert 1.6 < kept[1] / kept[0] < 2.1


def test_samples_do_not_mix_and_units_do_not_matter() -> None:
    kspace, mask, maps = scene()
    network = build(UnrolledReconstructor, "prox", num_steps=4)
    with torch.no_grad():
        together = network(kspace, mask, maps)
        torch.testing.assert_close(network(kspace[1:], mask, maps), together[1:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network(1e4 * kspace, mask, maps), 1e4 * together, rtol=1e-4, atol=1e-1)


def test_reload(tmp_path) -> None:
    data = scene()
    one = build(UnrolledReconstructor, "grad", num_steps=2)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.05)
    torch.save(one.state_dict(), tmp_path / "network.pt")
    two = build(UnrolledReconstructor, "grad", num_steps=2)
    assert not torch.equal(one(*data), two(*data))
    two.load_state_dict(torch.load(tmp_path / "network.pt", weights_only=True))
    assert torch.equal(one(*data), two(*data))


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="num_steps"):
        build(UnrolledReconstructor, "cg", num_steps=0)
    with pytest.raises(ValueError, match="form"):
        UnrolledReconstructor(2, form="proximal")
    with pytest.raises(ValueError, match="has no certificate"):
        UnrolledReconstructor(2, "ridge", form="grad", contraction=0.9)


def test_the_prior_follows_the_form() -> None:
    assert isinstance(UnrolledReconstructor(2, features=(4, 8)).cell.prior, UNetDenoiser)
    chosen = UnrolledReconstructor(2, form="reweighted", features=(4, 3)).cell.prior
    assert isinstance(chosen, WeaklyConvexRidgeDenoiser)
