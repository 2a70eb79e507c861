import pytest
import torch
from torch import nn

from monai_deqkan.adjoints import PhantomAdjoint, UnrolledAdjoint
from monai_deqkan.engines import attack_gradient_error, fgsm_attack, pgd_attack
from monai_deqkan.networks.nets import DEQKANClassifier


class Linear(nn.Module):
    """Logits ``W x``: the gradient of the cross-entropy is ``W^T (softmax - one-hot)``."""

    def __init__(self, classes=3, pixels=36):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, pixels, generator=torch.Generator().manual_seed(1)))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(images.flatten(1)) @ self.weight.T


def batch(count=4, seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    return 0.2 + 0.6 * torch.rand(count, 1, size, size, generator=generator), torch.arange(count) % 3


@pytest.fixture(scope="module")
def deqkan():
    torch.manual_seed(0)
    return DEQKANClassifier(2, 1, 3, features=(4, 4, 8, 8), hidden_features=16)


def test_fgsm_is_the_sign_of_the_closed_form_gradient():
    network, (images, labels) = Linear(), batch()
    gradient = ((images.flatten(1) @ network.weight.T).softmax(1) - torch.eye(3)[labels]) @ network.weight
    expected = images + 0.05 * gradient.sign().view_as(images)
    torch.testing.assert_close(fgsm_attack(network, images, labels, 0.05), expected.detach())


def test_pgd_reaches_the_corner_of_the_box_where_the_gradient_keeps_its_sign():
    # Of two classes, the gradient of a linear network always has one direction: the worst point is a corner.
    network, (images, labels) = Linear(classes=2), batch()
    labels = labels % 2
    direction = (network.weight[1 - labels] - network.weight[labels]).sign().view_as(images)
    attacked = pgd_attack(network, images, labels, 0.05)
    torch.testing.assert_close(attacked, (images + 0.05 * direction).detach())


def test_pgd_keeps_its_limits_and_seeds():
    network, (images, labels) = Linear(), batch(6)
    images[:, :, :2], images[:, :, 2:4] = 0.0, 1.0
    attacked = pgd_attack(network, images, labels, 4 / 255, seed=1)
    assert float((attacked - images).abs().max()) <= 4 / 255 + 1e-7
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert torch.equal(attacked, pgd_attack(network, images, labels, 4 / 255, seed=1))
    alone = pgd_attack(network, images[2:], labels[2:], 4 / 255, seed=1, first_index=2)
    torch.testing.assert_close(alone, attacked[2:])
    starts = [pgd_attack(network, images, labels, 4 / 255, step_size=0.0, seed=seed) for seed in (1, 2)]
    assert not torch.equal(*starts)
    assert torch.equal(pgd_attack(network, images, labels, 0.0), images)


def test_network_is_left_as_it_was(deqkan):
    images, labels = batch(3, size=32)
    deqkan.train()
    deqkan.backbone.eval()
    modes = [part.training for part in deqkan.modules()]
    state = {name: value.clone() for name, value in deqkan.state_dict().items()}
    with torch.no_grad():  # attacks enable gradients themselves
        pgd_attack(deqkan, images, labels, 0.01, num_steps=2)
        fgsm_attack(deqkan, images, labels, 0.01)
        attack_gradient_error(deqkan, images, labels)
    assert [part.training for part in deqkan.modules()] == modes
    assert all(parameter.grad is None for parameter in deqkan.parameters())
    assert all(torch.equal(value, state[name]) for name, value in deqkan.state_dict().items())
    assert not isinstance(deqkan.equilibrium.adjoint, UnrolledAdjoint)


def test_loss_grows_under_attack(deqkan):
    deqkan.eval()
    images, labels = batch(6, size=32)
    losses = [nn.functional.cross_entropy(deqkan(images), labels, reduction="none")]
    for attack in (fgsm_attack, pgd_attack):
        losses.append(
            nn.functional.cross_entropy(deqkan(attack(deqkan, images, labels, 0.01)), labels, reduction="none")
        )
    assert bool((losses[1] > losses[0]).all())
    assert bool((losses[2] > losses[0]).all())


def test_implicit_gradient_is_the_unrolled_one_and_a_masked_one_is_noticed(deqkan):
    images, labels = batch(4, size=32)
    error = attack_gradient_error(deqkan, images, labels)
    assert error.shape == (4,)
    assert float(error.max()) < 2e-3
    # In double precision by finite differences along the gradient: independent of any adjoint.
    torch.manual_seed(0)
    double = DEQKANClassifier(
        2, 1, 3, features=(4, 4, 8, 8), hidden_features=16, solver=("anderson", {"rtol": 1e-10, "max_iter": 200})
    )
    double = double.double().eval()
    double.equilibrium.adjoint = type(double.equilibrium.adjoint)(solver=("anderson", {"rtol": 1e-10}))
    image = images[:1].double().requires_grad_()
    loss = nn.functional.cross_entropy(double(image), labels[:1])
    gradient = torch.autograd.grad(loss, image)[0]
    step = 1e-5 * gradient / gradient.norm()
    with torch.no_grad():
        values = [nn.functional.cross_entropy(double(image + sign * step), labels[:1]) for sign in (1, -1)]
    assert float((values[0] - values[1]) / 2e-5) == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert float(attack_gradient_error(double, images[:1].double(), labels[:1], rtol=1e-10)) < 1e-7
    double.equilibrium.adjoint = PhantomAdjoint(num_steps=1)
    masked = attack_gradient_error(double, images[:1].double(), labels[:1])
    assert float(masked) > 1e-3


def test_one_logit_is_the_second_of_two_classes():
    images, labels = batch()
    labels = labels % 2
    two = Linear(classes=2)
    one = Linear(classes=1)
    one.weight = nn.Parameter(two.weight[1:] - two.weight[:1])
    torch.testing.assert_close(fgsm_attack(one, images, labels, 0.01), fgsm_attack(two, images, labels, 0.01))


def test_errors():
    network, (images, labels) = Linear(), batch()
    with pytest.raises(ValueError, match="no DEQLayer"):
        attack_gradient_error(network, images, labels)
    with pytest.raises(TypeError, match="class numbers"):
        fgsm_attack(network, images, labels.float(), 0.1)
    with pytest.raises(ValueError, match="shape"):
        pgd_attack(network, images, labels[:2], 0.1)
    with pytest.raises(ValueError, match="epsilon"):
        pgd_attack(network, images, labels, -0.1)
    with pytest.raises(ValueError, match="logits of shape"):
        fgsm_attack(nn.Identity(), images, labels, 0.1)
