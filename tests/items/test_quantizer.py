"""What every quantizer promises: greedy codes, soft codes that agree with them, gradients, a round trip to disk."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from llm_itemtok.errors import ArtifactError
from llm_itemtok.items.base import QUANTIZER_FILE
from llm_itemtok.items.product import ProductQuantizer
from llm_itemtok.items.quantizers import load_quantizer
from llm_itemtok.items.residual_kmeans import ResidualKMeansQuantizer
from llm_itemtok.items.rqvae import RQVAEQuantizer

SHAPE = {"levels": 3, "codebook_size": 4, "dimensions": 6}


def residual_kmeans_quantizer():
    quantizer = ResidualKMeansQuantizer(**SHAPE)
    torch.nn.init.normal_(quantizer.codebooks)
    return quantizer


def residual_kmeans_quantizer_on_components():
    quantizer = ResidualKMeansQuantizer(**SHAPE, latent_dimensions=2)
    torch.nn.init.normal_(quantizer.codebooks)
    torch.nn.init.normal_(quantizer.mean)
    quantizer.components.copy_(torch.linalg.qr(torch.randn(6, 2))[0])
    return quantizer


def residual_kmeans_quantizer_with_prices():
    quantizer = ResidualKMeansQuantizer(**SHAPE, balanced=True)
    torch.nn.init.normal_(quantizer.codebooks)
    torch.nn.init.normal_(quantizer.price_table, std=3.0)
    return quantizer


def product_quantizer():
    quantizer = ProductQuantizer(**SHAPE, latent_dimensions=5)
    torch.nn.init.normal_(quantizer.codebooks)
    torch.nn.init.normal_(quantizer.mean)
    quantizer.turn.copy_(torch.linalg.qr(torch.randn(6, 5))[0])
    return quantizer


def rqvae_quantizer():
    quantizer = RQVAEQuantizer(**SHAPE, widths=(8,), latent_dimensions=5)
    torch.nn.init.normal_(quantizer.codebooks)
    torch.nn.init.normal_(quantizer.mean)
    quantizer.scale.fill_(0.5)
    return quantizer


KINDS = [
    residual_kmeans_quantizer,
    residual_kmeans_quantizer_on_components,
    residual_kmeans_quantizer_with_prices,
    product_quantizer,
    rqvae_quantizer,
]


@pytest.fixture(params=KINDS)
def quantizer(request):
    torch.manual_seed(0)
    return request.param()


@pytest.fixture
def x():
    return torch.randn(20, 6, generator=torch.Generator().manual_seed(1))


def by_hand():
    quantizer = ResidualKMeansQuantizer(levels=2, codebook_size=2, dimensions=1)
    quantizer.codebooks.data = torch.tensor([[[0.0], [4.0]], [[0.0], [1.0]]])
    return quantizer


def test_soft_assignment_by_hand():
    """5: squared distances 25 and 1; the residual 5 - 4 = 1 has 1 and 0. 2 is a tie: the lowest index, residual 2."""
    first, second = by_hand().soft_assign(torch.tensor([[5.0], [2.0]]))
    torch.testing.assert_close(first, torch.softmax(torch.tensor([[-25.0, -1.0], [-4.0, -4.0]]), dim=1))
    torch.testing.assert_close(second, torch.softmax(torch.tensor([[-1.0, 0.0], [-4.0, -1.0]]), dim=1))
    assert by_hand().encode(torch.tensor([[5.0], [2.0]])).tolist() == [[1, 1], [0, 1]]


def test_losses_by_hand():
    """2 goes to 0 with residual 2 (squared 4), then to 1 with residual 1 (squared 1): means over levels 2.5 each."""
    out = by_hand()(torch.tensor([[2.0]]))
    assert out.codes.tolist() == [[0, 1]]
    assert out.reconstruction.tolist() == [[1.0]]
    assert out.reconstruction_loss.tolist() == [1.0]
    assert out.codebook_loss.tolist() == out.commitment_loss.tolist() == [2.5]


def test_hard_codes_are_the_argmax_of_soft_ones(quantizer, x):
    soft = quantizer.soft_assign(x)
    assert torch.equal(torch.stack([level.argmax(dim=1) for level in soft], dim=1), quantizer.encode(x))
    assert torch.equal(quantizer(x).codes, quantizer.encode(x))
    for level in soft:
        torch.testing.assert_close(level.sum(dim=1), torch.ones(20))


def test_reconstruction_is_what_the_codes_stand_for(quantizer, x):
    torch.testing.assert_close(quantizer(x).reconstruction, quantizer.decode(quantizer.encode(x)))


def test_encode_carries_no_gradient_and_decode_does(quantizer, x):
    codes = quantizer.encode(x)
    assert not codes.requires_grad
    quantizer.decode(codes).square().sum().backward()
    assert quantizer.codebooks.grad.abs().sum() > 0


def test_soft_assignment_reaches_every_level_unless_the_residual_is_straight_through(x):
    """In the released code of BLOGER and ETEGRec only the first level's probabilities move the encoder."""
    for straight_through in (False, True):
        reached = []
        for level in range(3):
            latent = x.clone().requires_grad_()
            soft = residual_kmeans_quantizer().soft_assign_latent(latent, straight_through_residual=straight_through)
            loss = soft[level][:, 0].log().sum()
            reached.append(loss.requires_grad and torch.autograd.grad(loss, latent, allow_unused=True)[0] is not None)
        assert reached == [True, not straight_through, not straight_through]


def test_soft_assignment_reaches_the_codebooks(quantizer, x):
    for level in quantizer.soft_assign(x):
        (gradient,) = torch.autograd.grad(level[:, 0].sum(), quantizer.codebooks, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_straight_through_gives_the_encoder_the_gradient_of_the_identity(x):
    """One estimate on the sum of the codewords; one a level would give three times as much."""
    latent = x.clone().requires_grad_()
    quantizer = residual_kmeans_quantizer()
    (gradient,) = torch.autograd.grad(quantizer(latent).reconstruction.sum(), latent)
    torch.testing.assert_close(gradient, torch.ones_like(x))


def test_codebook_loss_spares_the_encoder_and_commitment_spares_the_codebooks(x):
    quantizer = rqvae_quantizer()
    out = quantizer(x)
    weight = quantizer.encoder[0].weight
    gradients = torch.autograd.grad(out.codebook_loss.sum(), [weight, quantizer.codebooks], allow_unused=True)
    assert gradients[0] is None
    assert gradients[1].abs().sum() > 0
    gradients = torch.autograd.grad(out.commitment_loss.sum(), [weight, quantizer.codebooks], allow_unused=True)
    assert gradients[0].abs().sum() > 0
    assert gradients[1] is None


def test_save_then_load_is_the_identity_and_bytes_repeat(quantizer, x, tmp_path):
    content = quantizer.save(tmp_path / "a").read_bytes()
    assert quantizer.save(tmp_path / "b").read_bytes() == content
    loaded = load_quantizer(tmp_path / "a")
    assert type(loaded) is type(quantizer)
    assert not loaded.training
    assert torch.equal(loaded.encode(x), quantizer.encode(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), quantizer.decode(quantizer.encode(x)))
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not of a quantizer"),
        ({"format_version": 7}, "format version 7"),
        (
            {"class": "Sphere"},
            "unknown kind of quantizer 'Sphere'; known: ResidualKMeansQuantizer, RQVAEQuantizer",
        ),
        ({"settings": {"levels": 3}}, "contradicts its own settings"),
        ({"settings": {"levels": 2, "codebook_size": 4, "dimensions": 6}}, "contradicts its own settings"),
        ({"settings": {"levels": 0, "codebook_size": 4, "dimensions": 6}}, "contradicts its own settings"),
    ],
)
def test_load_refuses_what_was_not_saved(tmp_path, changes, message):
    path = residual_kmeans_quantizer().save(tmp_path)
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["quantizer"]) | changes
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, metadata={"quantizer": json.dumps(header)})
    with pytest.raises(ArtifactError, match=message):
        load_quantizer(tmp_path)


def test_load_refuses_a_missing_and_a_broken_file(tmp_path):
    with pytest.raises(ArtifactError, match="no quantizer there"):
        load_quantizer(tmp_path)
    (tmp_path / QUANTIZER_FILE).write_bytes(np.zeros(10).tobytes())
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        load_quantizer(tmp_path)
