"""The image codec: shapes, what its loss teaches whom, bad sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from openm6.core.errors import UsageError
from openm6.model.codec import Codec, CodecConfig, as_bytes, unit
from openm6.model.files import load_network, save_network

TINY = {"image_size": 16, "widths": [8, 16], "patch": 2, "levels": [4, 4], "depth": 1}


def tiny(**changes: Any) -> Codec:
    torch.manual_seed(0)
    return Codec(CodecConfig(**{**TINY, **changes}))


def pictures(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
def test_pictures_become_codes_and_codes_pictures(quantizer: str) -> None:
    codec = tiny(quantizer=quantizer, num_codes=16).eval()
    codes = codec.encode(pictures())
    assert codes.shape == (3, 4, 4) == (3, codec.config.side, codec.config.side)
    assert codes.min() >= 0
    assert codes.max() < codec.config.num_codes == 16
    made = codec.decode(codes)
    assert made.shape == (3, 16, 16, 3)
    assert made.dtype == torch.uint8
    output = codec(unit(pictures()))
    assert torch.equal(output.codes, codes)
    assert torch.equal(as_bytes(output.pixels.detach()), made)


def test_bytes_are_kept() -> None:
    assert torch.equal(as_bytes(unit(pictures())), pictures())


def test_a_picture_alone_loses_what_it_loses_among_others() -> None:
    codec = tiny().eval()
    together = codec(unit(pictures())).losses
    alone = torch.cat([codec(unit(pictures()[i : i + 1])).losses for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_the_loss_is_that_of_its_definition() -> None:
    codec = tiny(feature_loss=0.0).eval()
    x = unit(pictures())
    output = codec(x)
    error = output.pixels - x
    wanted = [float(e.abs().mean() + e.square().mean()) for e in error]
    assert output.losses.tolist() == pytest.approx(wanted)
    assert float(output.loss) == pytest.approx(sum(wanted))


def test_codec_and_critic_learn_against_each_other() -> None:
    """The codec's share of the critic's loss gives the critic no gradient, and the critic's own none to the codec."""
    x = unit(pictures())
    without, codec = tiny(feature_loss=0.0), tiny(feature_loss=0.0, critic_loss=0.5)
    codec.load_state_dict({**codec.state_dict(), **without.state_dict()})
    without(x).loss.backward()
    codec(x).loss.backward()
    assert codec.critic is not None
    own = {name: p.grad.clone() for name, p in codec.critic.named_parameters() if p.grad is not None}
    made = codec(x).pixels.detach()
    told = 3 * (torch.relu(1 - codec.critic(x)).mean() + torch.relu(1 + codec.critic(made)).mean())
    for name, gradient in zip(own, torch.autograd.grad(told, list(codec.critic.parameters())), strict=True):
        torch.testing.assert_close(own[name], gradient, msg=name)
    # What the codec gets beyond its own loss is the critic's opinion of its pictures.
    codec.zero_grad()
    (-3 * 0.5 * codec.critic(codec(x).pixels).mean()).backward()
    names = dict(without.named_parameters())
    extra = {name: p.grad for name, p in codec.named_parameters() if name in names}
    codec_again = tiny(feature_loss=0.0, critic_loss=0.5)
    codec_again.load_state_dict(codec.state_dict())
    codec_again(x).loss.backward()
    for name, parameter in codec_again.named_parameters():
        if name in names and names[name].grad is not None:
            torch.testing.assert_close(parameter.grad, names[name].grad + extra[name], atol=1e-5, rtol=1e-3, msg=name)


def test_it_is_saved_and_opened(tmp_path: Path) -> None:
    codec = tiny(quantizer="vq", num_codes=16).eval()
    codec.quantizer.codebook_KE.normal_()
    save_network(codec, tmp_path)
    again = load_network(Codec, tmp_path).eval()
    assert torch.equal(again.encode(pictures()), codec.encode(pictures()))
    assert again.config.num_codes == 16


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 18}, "image_size is 18; with patch 2 and 2 widths it has to be a multiple of 4"),
        ({"widths": [8, 12]}, r"widths are \[8, 12\]; each has to be a multiple of 8"),
        ({"quantizer": "rvq"}, 'quantizer is "rvq"; it can be fsq or vq'),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CodecConfig(**{**TINY, **sizes})
