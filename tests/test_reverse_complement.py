"""Layers that see both strands of DNA alike (Caduceus): ``f(RC(x)) = RC(f(x))``, to the bit, whole rows and documents of rows."""

import pytest
import torch
from torch import nn

from hybridzoo.kernels import Seq
from hybridzoo.layers import MLP, Mamba, Mamba2, RMSNorm
from hybridzoo.layers.reverse_complement import ReverseComplement, StrandEmbedding, StrandHead, reverse_complement

D, COMPLEMENT = 16, [3, 2, 1, 0, 4]  # A, C, G, T, N
LAYERS = [
    (kind, {"directions": n, **rest})
    for kind, rest in ((Mamba, {"d_state": 3}), (Mamba2, {"d_state": 5, "headdim": 8, "chunk_size": 4}))
    for n in (1, 2)
]
DOC = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 2, -1], [0, 1, 1, 1, 2, 2, 2, 2, 2]])
SEQS = {
    "whole": None,
    "packed": Seq.from_documents(DOC),
    "padded": Seq.from_mask(torch.tensor([[1] * 9, [1] * 4 + [0] * 5])),
    "map": Seq.from_grid((3, 3), 2, 9),
}


def drawn(layer):
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def rc(x):
    """By hand, of whole rows."""
    return x.flip(-1, -2)


@pytest.mark.parametrize("seq", SEQS)
@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_a_layer_is_equivariant_to_the_bit(kind, options, seq):
    layer, seq = drawn(kind(D, reverse_complement=True, **options)), SEQS[seq]
    x = torch.randn(2, 9, D, dtype=torch.float64)
    got, want = layer(reverse_complement(x, seq), seq=seq), reverse_complement(layer(x, seq=seq), seq)
    assert torch.equal(got, want) and not torch.equal(got, layer(x, seq=seq))
    plain = drawn(kind(D, **options))
    assert not torch.allclose(plain(rc(x)), rc(plain(x)))


def test_a_documents_reverse_complement_is_its_own():
    x = torch.randn(2, 9, D)
    turned = reverse_complement(x, SEQS["packed"])
    for row, start, end in ((0, 0, 5), (0, 5, 6), (0, 6, 8), (1, 0, 1), (1, 1, 4), (1, 4, 9)):
        assert torch.equal(turned[row, start:end], rc(x[row, start:end]))


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_half_the_channels_are_a_layer_of_half_the_width_on_either_strand(kind, options):
    layer, half = kind(D, reverse_complement=True, **options).double(), kind(D // 2, **options).double()
    half.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, D, dtype=torch.float64)
    want = torch.cat([half(x[..., : D // 2]), rc(half(rc(x[..., D // 2 :])))], -1)
    assert torch.equal(layer(x), want)
    assert layer.flops(9) == 2 * half.flops(9) and layer.active_parameters == half.active_parameters
    # each output follows from tokens on both sides, through one of its halves or the other
    assert "causal" not in layer.capabilities and layer.reach(9) is None


class Dna(nn.Module):
    """The example of the module's documentation."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = StrandEmbedding(COMPLEMENT, D), StrandHead(COMPLEMENT, D)
        self.blocks = nn.ModuleList(
            nn.Sequential(ReverseComplement(RMSNorm(D // 2)), mixer)
            for mixer in (
                Mamba(D, d_state=3, directions=2, reverse_complement=True),
                ReverseComplement(MLP(D // 2)),
                Mamba2(D, d_state=4, headdim=8, directions=2, reverse_complement=True),
                ReverseComplement(Mamba(D // 2, d_state=2)),
            )
        )
        self.norm_f = ReverseComplement(RMSNorm(D // 2))

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        x = self.norm_f(x)
        pooled = x.mean(1)
        return self.head(x), pooled[:, : D // 2] + pooled[:, D // 2 :].flip(-1)


def test_a_model_of_such_layers_gives_the_other_strand_the_same():
    model, complement = drawn(Dna()), torch.tensor(COMPLEMENT)
    ids = torch.randint(0, 5, (2, 30))
    other = complement[ids].flip(1)
    (here, one), (there, same) = model(ids), model(other)
    assert (there - here.flip(1)[..., complement]).abs().max() < 1e-12
    assert (one - same).abs().max() < 1e-12 and not torch.allclose(here, there)
    # tied, as language models of DNA are
    model.head.weight = model.embedding.weight
    assert (model(other)[0] - model(ids)[0].flip(1)[..., complement]).abs().max() < 1e-12
    model(ids)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_embedding_and_head_are_theirs_by_definition():
    embedding, head = StrandEmbedding(COMPLEMENT, D).double(), StrandHead(COMPLEMENT, D).double()
    ids, complement = torch.randint(0, 5, (2, 7)), torch.tensor(COMPLEMENT)
    x = embedding(ids)
    assert torch.equal(x, torch.cat([embedding.weight[ids], rc(embedding.weight[complement[ids].flip(1)])], -1))
    want = x[..., : D // 2] @ head.weight.T + (rc(x[..., D // 2 :]) @ head.weight.T).flip(1)[..., complement]
    assert torch.allclose(head(x), want, rtol=0, atol=1e-12)
    assert set(embedding.state_dict()) == set(head.state_dict()) == {"weight", "complement"}


def test_a_module_that_knows_documents_is_given_them():
    wrapped, layer = (
        ReverseComplement(drawn(Mamba(D // 2, d_state=3))),
        drawn(Mamba(D, d_state=3, reverse_complement=True)),
    )
    layer.load_state_dict(wrapped.module.state_dict())
    x = torch.randn(2, 9, D, dtype=torch.float64)
    for seq in SEQS.values():
        assert torch.equal(wrapped(x, seq), layer(x, seq=seq))


@pytest.mark.parametrize("complement", [[1, 2, 0], [3, 0], [-1, 1]])
def test_a_complement_that_is_none_is_refused(complement):
    for build in (StrandEmbedding, StrandHead):
        with pytest.raises(ValueError, match="complement: letter 0 has"):
            build(complement, 8)
        with pytest.raises(ValueError, match="d_model: 7 channels"):
            build(COMPLEMENT, 7)
