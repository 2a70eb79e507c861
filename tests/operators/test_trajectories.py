import math

import pytest
import torch

from monai_deqkan.operators import golden_angle_trajectory, radial_trajectory, spiral_trajectory


def test_spokes_are_straight_hold_the_centre_and_turn_by_the_stated_angle():
    for k, step in (
        (radial_trajectory((20, 20), 5, 10), math.pi / 5),
        (golden_angle_trajectory((20, 20), 5, 10), math.radians(111.2461)),
    ):
        assert torch.equal(k[:, 5], torch.zeros(5, 2, dtype=torch.float64))
        torch.testing.assert_close(k.diff(dim=1), (k[:, 1:2] - k[:, :1]).expand(-1, 9, -1))
        torch.testing.assert_close(k[:, 0].norm(dim=-1), torch.full((5,), 10.0, dtype=torch.float64))
        angles = torch.atan2(k[:, 9, 1], k[:, 9, 0])
        torch.testing.assert_close(
            (angles.diff() % math.pi), torch.full((4,), step % math.pi).double(), rtol=1e-5, atol=0
        )


def test_axes_of_unequal_size_reach_their_own_edges():
    k = radial_trajectory((20, 30), 2)
    assert k.shape == (2, 60, 2)
    assert k[0, 0].tolist() == pytest.approx([-10, 0])
    assert k[1, 0].tolist() == pytest.approx([0, -15])


def test_golden_spokes_in_3d_cover_the_half_sphere_evenly():
    k = golden_angle_trajectory((8, 8, 8), 2000, 4)
    directions = k[:, 0] / k[:, 0].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(k[:, 0].norm(dim=-1), torch.full((2000,), 4.0, dtype=torch.float64))
    # Uniform on the sphere: the second moments are all one third.
    torch.testing.assert_close(directions.T @ directions / 2000, torch.eye(3).double() / 3, rtol=0, atol=0.01)


def test_spiral_arms_run_from_the_centre_to_the_edge_at_equal_distances():
    k = spiral_trajectory((40, 40), 8, 400)
    radius = k.norm(dim=-1)
    assert bool((radius.diff(dim=1) > 0).all())
    torch.testing.assert_close(radius[:, 0], torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(radius[:, -1], torch.full((8,), 20.0, dtype=torch.float64))
    # Arms cross a ray one cycle per field of view apart.
    on_ray = torch.cat(
        [radius[j][(torch.atan2(k[j, :, 1], k[j, :, 0]).diff(prepend=torch.zeros(1)) < -3)] for j in range(8)]
    )
    gaps = on_ray.sort().values.diff()
    assert float(gaps.mean()) == pytest.approx(1.0, abs=0.1)
    steps = k.diff(dim=1).norm(dim=-1)[0, 100:]
    assert steps.max() / steps.min() < 1.1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="spatial_dims"):
        radial_trajectory((4, 4, 4), 3)
    with pytest.raises(ValueError, match="num_spokes"):
        golden_angle_trajectory((4, 4), 0)
    with pytest.raises(ValueError, match="num_turns"):
        spiral_trajectory((4, 4), 2, 10, num_turns=0)
