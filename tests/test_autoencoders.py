"""The deterministic family: the same pair with a point-mass guide, in plain Pyro."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pvae
from pvae import (
    VAE,
    bounds,
    corruptions,
    guides,
    likelihoods,
    penalties,
    priors,
    recipes,
    schedules,
)
from pvae.errors import ArgumentError, CheckpointError, PairError, PvaeWarning, UndefinedError
from pvae.networks import MLP, ConvDecoder, unit_norm

D, Q, N = 6, 3, 20

RECIPES: dict[str, Callable[[], VAE]] = {
    "ae": lambda: recipes.ae(D, Q, hidden=(8,)),
    "sparse": lambda: recipes.sparse_ae(D, Q, hidden=(8,)),
    "sparse, student": lambda: recipes.sparse_ae(D, Q, hidden=(8,), prior=priors.StudentT),
    "sparse activations": lambda: recipes.sparse_activations_ae(D, Q, hidden=(8,)),
    "contractive": lambda: recipes.contractive_ae(D, Q, hidden=(8,)),
    "contractive, squared": lambda: recipes.contractive_ae(D, Q, hidden=(8,), squared=True),
    "contractive, estimated": lambda: recipes.contractive_ae(D, Q, hidden=(8,), num_probes=2),
    "denoising": lambda: recipes.denoising_ae(D, Q, hidden=(8,)),
    "masking": lambda: recipes.denoising_ae(D, Q, hidden=(8,), corruption=corruptions.Masking(0.2)),
    "rae": lambda: recipes.rae(D, Q, hidden=(8,)),
    "wae": lambda: recipes.wae(D, Q, hidden=(8,)),
    "vq": lambda: recipes.vq_vae(D, 2, num_latents=3, num_codes=8, hidden=(8,)),
    "denoising, sparse and contractive": lambda: recipes.sparse_ae(
        D,
        Q,
        hidden=(8,),
        corruption=corruptions.Noise(0.1),
        penalties=[penalties.Contractive(0.1), penalties.WeightDecay(1e-3)],
    ),
    "denoising vae": lambda: recipes.vae(D, Q, hidden=(8,), corruption=corruptions.Noise(0.1)),
    "contractive vae": lambda: recipes.vae(D, Q, hidden=(8,), penalties=penalties.Contractive(0.1)),
}


def data(n: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.rand(n, D, generator=generator).round()


def network(part: nn.Module) -> nn.Module:
    return part.get_submodule("network")


@pytest.mark.parametrize("name", RECIPES)
def test_plain_svi_trains_each(name: str, device: torch.device) -> None:
    """No pvae tool: every parameter moves, the loss falls, Pyro's store stays empty."""
    torch.manual_seed(0)
    vae, x = RECIPES[name]().to(device), data().to(device)
    before = copy.deepcopy(dict(vae.named_parameters()))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(150)]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert all((p != before[n]).any() for n, p in vae.named_parameters())
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("name", RECIPES)
def test_fit_resumes_each_exactly(name: str, tmp_path: Any, device: torch.device) -> None:
    def run(folder: str, epochs: int, *, resume: bool = False) -> VAE:
        torch.manual_seed(0)
        vae = RECIPES[name]()
        pvae.fit(
            vae, data(), epochs=epochs, batch_size=8, device=device,
            folder=tmp_path / folder, resume=resume, progress=False,
        )  # fmt: skip
        return vae

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, resume=True)
    for (name_of, a), b in zip(
        whole.state_dict().items(), parts.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name_of


def test_plain_the_loss_is_the_squared_error(device: torch.device) -> None:
    vae, x = RECIPES["ae"]().to(device), data().to(device)
    loss = Trace_ELBO().loss(vae.model, vae.guide, x)
    back = network(vae.model.likelihood)(network(vae.guide.posterior)(x))
    torch.testing.assert_close(vae.reconstruct(x), back.detach())
    expected = (x - back).square().sum().detach() + N * D / 2 * math.log(math.pi)
    assert loss == pytest.approx(float(expected), rel=1e-12)


def test_sparse_is_the_l1_penalty_up_to_its_constant(device: torch.device) -> None:
    """The Laplace prior's loss is lambda ||z||_1 - d log(lambda / 2), in value and gradient."""
    rate = 0.37
    vae = recipes.sparse_ae(D, Q, hidden=(8,), l1=rate).to(device)
    x = data().to(device)
    parameters = list(vae.parameters())
    ours = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x)
    z = network(vae.guide.posterior)(x)
    error = (x - network(vae.model.likelihood)(z)).square().sum()
    penalised = error + rate * z.abs().sum()
    constant = N * (D / 2 * math.log(math.pi) + Q * math.log(2 / rate))
    assert float((ours - penalised).detach()) == pytest.approx(constant, abs=1e-6)
    gradients = torch.autograd.grad(ours, parameters)
    for a, b in zip(gradients, torch.autograd.grad(penalised, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_student_is_its_penalty_up_to_a_constant() -> None:
    prior = priors.StudentT(Q, df=2.5, scale=0.3)()
    z = torch.randn(10, Q)
    penalty = 1.75 * torch.log1p(z.square() / (2.5 * 0.09)).sum(1)
    constants = prior.log_prob(z) + penalty
    torch.testing.assert_close(constants, constants[:1].expand(10))


@pytest.mark.parametrize("conv", [False, True])
def test_unit_columns(conv: bool) -> None:
    """No column grows, whatever training does to it."""
    net: nn.Module = ConvDecoder(Q, (1, 5, 5), (4,), 8) if conv else MLP(Q, D, (8,))
    plain = copy.deepcopy(net)
    unit_norm(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    z = torch.randn(10, Q)
    for _ in range(5):
        optimizer.zero_grad()
        (-net(z).square().mean()).backward()
        optimizer.step()
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            columns = module.weight.transpose(0, 1).flatten(1).norm(dim=1)
            torch.testing.assert_close(columns, torch.ones_like(columns))
    again = unit_norm(copy.deepcopy(plain))
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(z), net(z))


def test_without_unit_columns_the_penalty_is_cheated() -> None:
    """Halving the code and doubling the decoder's first layer: the same function, half the L1."""
    cheat, honest = (
        recipes.sparse_ae(D, Q, hidden=(), unit_norm=norm, l1=1.0) for norm in (False, True)
    )
    x = data()
    with torch.no_grad():
        for vae in (cheat, honest):
            before = vae.reconstruct(x), vae.encode(x).abs().sum()
            encoder, decoder = network(vae.guide.posterior), network(vae.model.likelihood)
            for parameter in encoder.parameters():
                parameter.mul_(0.5)
            for name, parameter in decoder.named_parameters():
                if "weight" in name:
                    parameter.mul_(2.0)
            torch.testing.assert_close(vae.encode(x).abs().sum(), before[1] / 2)
            is_same = torch.allclose(vae.reconstruct(x), before[0])
            assert is_same is (vae is cheat)


def test_a_code_that_can_be_exactly_zero(device: torch.device) -> None:
    """Trained, most entries are 0 with a ReLU at the encoder's end, and none without."""
    x = data(64).to(device)
    shares = []
    for activation in (nn.ReLU, None):
        torch.manual_seed(0)
        vae = recipes.sparse_ae(D, 12, hidden=(8,), l1=0.5, code_activation=activation).to(device)
        pvae.fit(vae, x, epochs=30, lr=1e-2, device=device, progress=False)
        shares.append(float((vae.encode(x) == 0).double().mean()))
    assert shares[0] > 0.5
    assert shares[1] == 0


@pytest.mark.parametrize("network", recipes.NETWORKS)
def test_a_linear_decoder(device: torch.device, network: str) -> None:
    """An affine map from code to image, whatever the encoder."""
    vae = recipes.sparse_ae((1, 8, 8), 5, network=network, hidden=(4,)).to(device)
    z = torch.randn(7, 5, device=device)
    decoded, origin = vae.decode(z), vae.decode(torch.zeros(1, 5, device=device))
    columns = vae.decode(torch.eye(5, device=device)) - origin
    torch.testing.assert_close(decoded, torch.einsum("nk,k...->n...", z, columns) + origin)
    torch.testing.assert_close(columns.flatten(1).norm(dim=1), torch.ones(5, device=device))
    assert bool((vae.encode(torch.randn(7, 1, 8, 8)) >= 0).all())


def test_widths_of_the_decoder() -> None:
    vae = recipes.ae(D, Q, hidden=(8, 7), decoder_hidden=(6,), code_activation=nn.Tanh)
    widths = [m.out_features for m in vae.model.likelihood.modules() if isinstance(m, nn.Linear)]
    assert widths == [6, D]
    assert isinstance([*vae.guide.posterior.modules()][-1], nn.Tanh)


def test_a_code_activation_needs_a_point_mass() -> None:
    with pytest.raises(ArgumentError, match="MeanField, whose parameters"):
        recipes.vae(D, Q, code_activation=nn.ReLU)


def test_a_code_that_is_an_activation_counts_once(device: torch.device) -> None:
    vae = recipes.sparse_activations_ae(
        D, Q, hidden=(8,), code_activation=nn.ReLU, l1_activations=1.0, decoder_hidden=()
    ).to(device)
    x = data().to(device)
    terms = pvae.terms.compute(vae.inspect((x,)), (x,))
    first = next(m for m in vae.guide.modules() if isinstance(m, nn.Linear))
    expected = first(x).relu().sum(1) + vae.encode(x).sum(1)
    found = torch.cat([*terms.penalties.values()]).sum(0)
    torch.testing.assert_close(-found, expected)


# Overcomplete


def fit(vae: VAE, **options: Any) -> Any:
    return pvae.fit(vae, data(), epochs=1, batch_size=8, progress=False, **options)


def test_an_overcomplete_plain_autoencoder_is_warned_about(device: torch.device) -> None:
    for latent_dim in (D, D + 5):
        with pytest.warns(PvaeWarning, match=rf"The code has {latent_dim} entries, the data .* 6"):
            fit(recipes.ae(D, latent_dim, hidden=(8,)), device=device)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(recipes.ae, D, D - 1),
        functools.partial(recipes.sparse_ae, D, D + 5),
        functools.partial(recipes.sparse_activations_ae, D, D + 5),
        functools.partial(recipes.contractive_ae, D, D + 5),
        functools.partial(recipes.denoising_ae, D, D + 5),
        functools.partial(recipes.ae, D, D + 5, corruption=lambda x: x.roll(1, 1)),
        functools.partial(recipes.ae, D, D + 5, prior=priors.StandardNormal),
        functools.partial(recipes.vae, D, D + 5),
        lambda hidden: VAE(  # a codebook, and no commitment
            priors.Flat((D, 2)),
            likelihoods.Gaussian(nn.Sequential(nn.Flatten(-2), MLP(2 * D, D, hidden)), D, sigma=1),
            guides.NearestCode(MLP(D, 2 * D, hidden), (D, 2), num_codes=4),
        ),
    ],
)
def test_what_keeps_it_from_the_identity_isnt(make: Any, device: torch.device) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(make(hidden=(8,)), device=device)


def test_a_users_own_overcomplete_pair_is_warned_about(device: torch.device) -> None:
    """The check looks at the programs, not at who wrote them."""
    encoder, decoder = nn.Linear(D, D + 1).to(device), nn.Linear(D + 1, D).to(device)

    class Program(nn.Module):
        def __init__(self, part: nn.Module, *, is_guide: bool) -> None:
            super().__init__()
            self.part, self.is_guide = part, is_guide

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                if self.is_guide:
                    pyro.sample("z", dist.Delta(self.part(x), event_dim=1))
                else:
                    flat = dist.ImproperUniform(dist.constraints.real_vector, (), (D + 1,))
                    z = pyro.sample("z", flat)
                    pyro.sample("x", dist.Normal(self.part(z), 1.0).to_event(1), obs=x)

    with pytest.warns(PvaeWarning, match="can learn the identity"):
        pvae.fit(
            (Program(decoder, is_guide=False), Program(encoder, is_guide=True)),
            data(),
            epochs=1,
            progress=False,
            device=device,
        )


def test_compression_on_one_side_and_the_identity_on_the_other(device: torch.device) -> None:
    """A linear autoencoder loses what PCA loses, as long as its code is too small; from the data's
    dimension on it is the identity, which also reconstructs what is no data at all."""
    factors = torch.randn(200, 3) @ torch.randn(3, D) + 0.3 * torch.randn(200, D)
    x = (factors - factors.mean(0)).to(device)
    spectrum = torch.linalg.svdvals(x).square() / len(x)
    foreign = 3 * torch.rand(50, D, device=device)
    errors: dict[int, tuple[float, float]] = {}
    for latent_dim in (1, 2, D, D + 4):
        torch.manual_seed(0)
        ae = recipes.ae(D, latent_dim, hidden=())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PvaeWarning)
            pvae.fit(
                ae,
                x,
                epochs=400,
                batch_size=None,
                lr=3e-2,
                lr_schedule=schedules.Cosine(),
                progress=False,
                device=device,
            )
        ours, theirs = (
            float((v - ae.reconstruct(v).detach()).square().sum(1).mean()) for v in (x, foreign)
        )
        errors[latent_dim] = ours, theirs
        assert ours == pytest.approx(float(spectrum[latent_dim:].sum()), rel=0.02, abs=1e-3)
    assert errors[1][1] > errors[2][1] > 0.1
    assert errors[D][1] < 1e-2
    assert errors[D + 4][1] < 1e-2


def test_the_limit_of_a_vae_without_noise_is_the_autoencoder(device: torch.device) -> None:
    """Flat prior, sigma to 0: the expected error goes to the autoencoder's like sigma squared."""
    ae, x = recipes.ae(D, Q, hidden=(8,), activation=nn.Tanh).to(device), data().to(device)
    exact = -bounds.elbo(ae, x).mean
    gaps = []
    for sigma in (0.1, 0.01):

        def scale(raw: Tensor, sigma: float = sigma) -> Tensor:
            return torch.full_like(raw, sigma)

        class Code(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                z = network(ae.guide.posterior)(x)
                return z, z

        for parameter in ae.parameters():
            parameter.requires_grad = False  # a network in a closure isn't trained
        noisy = VAE(priors.Flat(Q), ae.model.likelihood, guides.MeanField(Code(), Q, scale))
        found = bounds.elbo(noisy, x, 4000)
        assert found.distortion is not None
        gaps.append(found.distortion.mean - exact)
    assert gaps[0] > 0
    assert gaps[1] == pytest.approx(gaps[0] / 100, rel=0.2, abs=2e-4)


# Quantised codes


def quantising(device: torch.device, **options: Any) -> guides.NearestCode:
    part = guides.NearestCode(nn.Identity(), (2, 2), num_codes=4, **options).to(device)
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    part.codes.copy_(corners)
    part.sums.copy_(corners)
    part.counts.fill_(1.0)
    return part


def test_each_vector_takes_its_nearest_code(device: torch.device) -> None:
    part = quantising(device).eval()
    x = torch.rand(7, 2, 2, device=device)
    torch.testing.assert_close(part(x).mean, x.round())  # the corners of a square


def test_gradients_go_straight_through(device: torch.device) -> None:
    part = quantising(device).eval()
    x = torch.rand(7, 2, 2, device=device, requires_grad=True)
    factor = torch.rand(7, 2, 2, device=device)
    (part(x).rsample() * factor).sum().backward()
    torch.testing.assert_close(x.grad, factor)


def test_codes_follow_their_vectors(device: torch.device) -> None:
    """One batch: the moving averages of counts and sums, and their ratio."""
    part = quantising(device, decay=0.9)
    x = torch.rand(7, 2, 2, device=device)
    part(x)
    for k, corner in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        mine = x.reshape(-1, 2)[(x.reshape(-1, 2).round() == torch.tensor(corner).to(x)).all(1)]
        count = 0.9 + 0.1 * len(mine)
        total = 0.9 * torch.tensor(corner).to(x) + 0.1 * mine.sum(0)
        torch.testing.assert_close(part.counts[k], torch.tensor(count).to(x))
        torch.testing.assert_close(part.codes[k], total / count)
    codes = part.codes.clone()
    part.eval()
    part(x)
    part.train()
    with torch.no_grad():
        part(x)
    assert torch.equal(part.codes, codes)  # by training steps alone


def test_dead_codes_come_back(device: torch.device) -> None:
    part = quantising(device, decay=0.5, dead=0.1)
    part.codes[3] = 1e6
    part.sums[3] = 1e6
    x = torch.rand(200, 2, 2, device=device)
    for _ in range(6):
        part(x)
    used = part.nearest(x).unique()
    assert used.tolist() == [0, 1, 2, 3]
    assert float(part.codes.abs().max()) <= 1.0


def test_commitment_is_the_distance_to_the_codes(device: torch.device) -> None:
    vae = recipes.vq_vae(D, 2, num_latents=3, num_codes=8, hidden=(8,), commitment=0.3).to(device)
    x = data().to(device)
    terms = pvae.terms.compute(vae.inspect((x,)), (x,))
    encoded = network(vae.guide.posterior)(x).reshape(N, 3, 2)
    part = vae.guide.posterior
    assert isinstance(part, guides.NearestCode)
    gap = (encoded - part.codes[part.nearest(encoded)]).square().sum((1, 2))
    torch.testing.assert_close(-terms.penalties["commitment_guide"][0], 0.3 * gap)


def test_a_code_is_exactly_one_of_the_codebook(device: torch.device) -> None:
    vae = recipes.vq_vae(D, 2, num_latents=3, num_codes=8, hidden=(8,)).to(device)
    part = vae.guide.posterior
    assert isinstance(part, guides.NearestCode)
    z = vae.encode(100 * data().to(device)).reshape(-1, 2)
    assert all((part.codes == row).all(1).any() for row in z)
    far = quantising(device)
    far.codes.add_(1e4)
    vectors = 1e4 + torch.rand(200, 2, 2, device=device)
    assert torch.equal(far.nearest(vectors)[:1], far.nearest(vectors[:1]))
    torch.testing.assert_close(far.codes[far.nearest(vectors)] - 1e4, (vectors - 1e4).round())


def test_one_vector_and_one_row(device: torch.device) -> None:
    vae = recipes.vq_vae(D, 2, num_latents=1, num_codes=8, hidden=(8,)).to(device)
    assert vae.encode(data(1).to(device)).shape == (1, 1, 2)
    with pytest.raises(ArgumentError, match="vq_vae: expected no prior of its own"):
        recipes.vq_vae(D, 2, prior=priors.Flat)


def test_grouped_and_transposed_convolutions_get_unit_columns() -> None:
    up, grouped = nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 6, 3, groups=2)
    unit_norm(nn.Sequential(up, grouped))
    for column in up.weight:
        assert float(column.detach().norm()) == pytest.approx(1.0)
    for group in grouped.weight.unflatten(0, (2, 3)):
        norms = group.transpose(0, 1).flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(2))


def test_other_parts_arent_resumed(tmp_path: Any, device: torch.device) -> None:
    """Weights of penalties, kinds of corruption, dropout: a training is of one pair."""

    def run(**options: Any) -> None:
        vae = recipes.ae(D, Q, hidden=(8,), **options)
        pvae.fit(
            vae, data(), epochs=2, folder=tmp_path, resume=True, progress=False,
            device=device,
        )  # fmt: skip

    run(corruption=corruptions.Noise(0.1), penalties=penalties.MMD(10.0))
    run(corruption=corruptions.Noise(0.1), penalties=penalties.MMD(10.0))
    with pytest.raises(CheckpointError, match=r"corruption: saved Noise, now Masking"):
        run(corruption=corruptions.Masking(0.9), penalties=penalties.MMD(10.0))
    with pytest.raises(CheckpointError, match=r"weight: saved 10\.0, now 500\.0"):
        run(corruption=corruptions.Noise(0.1), penalties=penalties.MMD(500.0))


def test_a_last_batch_of_one_row_is_refused_before_training(device: torch.device) -> None:
    vae = recipes.wae(D, Q, hidden=(8,))
    with pytest.raises(ArgumentError, match="batch norm and MMD need"):
        pvae.fit(vae, data(17), batch_size=8, progress=False, device=device)


# What a point mass doesn't have


@pytest.mark.parametrize("name", [n for n in RECIPES if "vae" not in n])
def test_evidence_is_refused_by_name(name: str, device: torch.device) -> None:
    vae, x = RECIPES[name]().to(device), data().to(device)
    with pytest.raises(UndefinedError, match=r"a point mass \(Delta\) at site 'z'"):
        bounds.evidence(vae, x)
    found = bounds.elbo(vae, x)
    assert found.name != "ELBO"
    assert found.rate is None


@pytest.mark.parametrize("sigma", ["shared", "feature", "predicted", "optimal"])
def test_a_scale_that_adapts_has_no_maximum(sigma: str) -> None:
    family = functools.partial(likelihoods.Gaussian, sigma=sigma)
    for make in (recipes.ae, recipes.sparse_ae, recipes.wae, recipes.vq_vae):
        with pytest.raises(PairError, match="there is no best fit"):
            make(D, Q, hidden=(8,), likelihood=family)
