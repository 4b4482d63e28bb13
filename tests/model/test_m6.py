"""The network: sizes of the papers, equal paths (plain, SDPA, FlexAttention, cached), files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoConfig, AutoModel

import openm6.hf
from openm6.core.batch import pack, pad
from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.sequence import IGNORE, ImageTarget
from openm6.model import M6, ModelConfig, cpu
from openm6.model.count import count_parameters
from openm6.model.embed import cell_features
from openm6.model.files import load_model, save_network
from openm6.model.loss import Teacher, linear_cross_entropy
from openm6.model.masks import build_mask
from tests.conftest import example, tiny_config, tiny_model

# Total parameters as the papers' own arithmetic gives them: attention 4 d^2 a layer, feed-forward 2 d f a layer or
# expert, embedding V d. M6-base is stated as 327M, M6-T's sizes as 1.4B, 10.8B, 103.2B and 1002.7B.
PAPERS = {
    "m6-base": 327e6,
    "m6-10b": 50 * 12 * 4096**2 + 21128 * 4096,
    "m6-moe-100b": 103.1e9,
    "m6-t-base": 1.385e9,
    "m6-t-10b": 10.8e9,
    "m6-t-100b": 103.2e9,
    "m6-t-1t": 1002.7e9,
    "m6-10t": 10.05e12,
}


@pytest.mark.parametrize("name", PAPERS)
def test_presets_have_the_papers_parameters(name: str) -> None:
    config = ModelConfig.preset(name)
    parts = count_parameters(config)
    assert sum(parts.values()) == pytest.approx(PAPERS[name], rel=0.01)


@pytest.mark.parametrize("name", ["demo", "small", *PAPERS])
def test_counted_parameters_are_those_of_the_network(name: str) -> None:
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        model = M6(config)
    assert sum(p.numel() for p in model.parameters()) == sum(count_parameters(config).values())


@pytest.mark.parametrize("bias", [{}, {"qkv_bias": True}, {"bias": True}, {"bias": True, "qkv_bias": False}])
def test_counted_parameters_have_the_biases(bias: dict) -> None:
    model = tiny_model(num_key_value_heads=2, **bias)
    assert sum(p.numel() for p in model.parameters()) == sum(count_parameters(model.config).values())


def test_dense_parts_of_expert_presets_are_those_of_a_dense_network() -> None:
    config = ModelConfig.preset("m6-moe-100b")
    dense = ModelConfig.preset("m6-base")
    parts, same = count_parameters(config), count_parameters(dense)
    assert parts["feed_forward"] * 2 == same["feed_forward"]
    assert {k: parts[k] for k in ("embedding", "attention", "norms")} == {
        k: same[k] for k in ("embedding", "attention", "norms")
    }


def test_unknown_preset_and_size_are_named() -> None:
    with pytest.raises(UsageError, match='no preset "m6-bas". Did you mean "m6-base"'):
        ModelConfig.preset("m6-bas")
    with pytest.raises(UsageError, match="hiden_size. Did you mean"):
        ModelConfig.preset("demo", hiden_size=3)
    with pytest.raises(UsageError, match=r'model.norm is "batch"; it can be rms, layer'):
        ModelConfig(norm="batch")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "qk_norm": True},
        {"norm": "layer", "activation": "gelu", "positions": "learned"},
        {"tie_word_embeddings": False, "head_dim": 12},
    ],
)
def test_flex_attention_and_sdpa_give_the_plain_results(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    batch = pack([example(rng, n % 5, 3 + n % 4, ((2, 2),) * (n % 2)) for n in range(9)], 40, 0)
    model = tiny_model(**changes)
    with torch.no_grad():
        plain = model(batch)
        monkeypatch.setattr(cpu, "enabled", False)
        sdpa = model(batch)
        monkeypatch.setattr("openm6.model.masks.build_mask", partial(build_mask, flex=True))
        flex = model(batch)
    real = batch.segments > 0
    torch.testing.assert_close(plain.hidden[real], sdpa.hidden[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain.hidden[real], flex.hidden[real], atol=1e-5, rtol=1e-5)


def test_plain_attention_has_the_gradients_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    # Longer than a query chunk, so that chunks and their key ranges take part.
    batch = pack([example(rng, 90, 70), example(rng, 60, 60), example(rng, 20, 130)], 300, 0)
    gradients = []
    for limit in (0, 10_000):
        monkeypatch.setattr("openm6.model.cpu.attention.PLAIN_LIMIT", limit)
        torch.manual_seed(0)
        model = tiny_model(num_key_value_heads=2)
        model(batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_source_is_read_both_ways_and_target_is_not() -> None:
    rng = np.random.default_rng(3)
    model = tiny_model()
    sequence = example(rng, 6, 6)
    before = model(pad([sequence], 0)).hidden[0]
    late_source = example(np.random.default_rng(3), 6, 6)
    late_source.ids[5] = (late_source.ids[5] + 1) % 97
    assert not torch.allclose(model(pad([late_source], 0)).hidden[0, 0], before[0])
    late_target = example(np.random.default_rng(3), 6, 6)
    late_target.ids[11] = (late_target.ids[11] + 1) % 97
    torch.testing.assert_close(model(pad([late_target], 0)).hidden[0, :11], before[:11])


@settings(max_examples=20)
@given(st.lists(st.sampled_from([(1, 1), (1, 2), (2, 2)]), max_size=2), st.integers(1, 8), st.data())
def test_no_position_of_a_causal_source_depends_on_a_later_one(shapes: list, source: int, data: st.DataObject) -> None:
    model = tiny_model()
    one, other = (example(np.random.default_rng(0), source, 3, tuple(shapes), read="causal") for _ in range(2))
    place = data.draw(st.integers(0, len(one) - 1))
    other.ids[place:] = np.random.default_rng(1).integers(1, 97, len(one) - place)
    for picture in other.pictures:
        if picture.start >= place:
            picture.pixels[...] = 255 - picture.pixels
    with torch.no_grad():
        hidden = model(pack([one, other], 64, 0)).hidden
        first, second = hidden.flatten(0, 1)[: 2 * len(one)].split(len(one))
    torch.testing.assert_close(first[:place], second[:place], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("embedder", ["patch", "stem", "resnet"])
def test_every_embedder_reads_several_pictures_of_any_shape(embedder: str) -> None:
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    changes = {"image_embedder": embedder, "stem_widths": [8, 16, 16], "resnet": resnet}
    model = tiny_model(**changes)
    stride = model.config.image_stride
    rng = np.random.default_rng(4)
    sequence = example(rng, 3, 3, ((2, 2), (1, 4), (3, 1)), patch=stride)
    hidden = model(pad([sequence], 0)).hidden
    for picture in sequence.pictures:
        changed = example(np.random.default_rng(4), 3, 3, ((2, 2), (1, 4), (3, 1)), patch=stride)
        same = next(p for p in changed.pictures if p.start == picture.start)
        same.pixels[...] = 255 - same.pixels
        assert not torch.allclose(model(pad([changed], 0)).hidden[0, -1], hidden[0, -1]), "a picture is ignored"


def test_a_patch_knows_its_row_and_column() -> None:
    model = tiny_model()
    pixels = torch.full((1, 16, 16, 3), 128, dtype=torch.uint8)
    features = model.image(pixels)
    for first in range(4):
        for second in range(first):
            assert not torch.allclose(features[first], features[second])


def test_longer_pictures_than_places_are_interpolated() -> None:
    model = tiny_model(image_max_patches=4)
    assert model.image(torch.zeros(1, 8, 64, 3, dtype=torch.uint8)).shape == (8, 32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shared", [False, True])
def test_loss_without_logits_equals_cross_entropy_with_gradients(shared: bool, smoothing: float) -> None:
    hidden = torch.randn(2500, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (2500,))
    shares = torch.rand(2500) * 3 if shared else None
    total, losses = linear_cross_entropy(hidden, weight, labels, shares, smoothing)
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(losses, cross_entropy(hidden @ weight.T, labels, reduction="none").detach())
    expected = cross_entropy(hidden @ weight.T, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(total, (expected if shares is None else expected * shares).sum(), rtol=1e-5, atol=1e-3)
    ours = torch.autograd.grad(3 * total, (hidden, weight))
    theirs = torch.autograd.grad(3 * (expected if shares is None else expected * shares).sum(), (hidden, weight))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_a_teachers_part_of_the_loss_is_the_divergence_from_it() -> None:
    hidden, weight = torch.randn(2500, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels, wanted, shares = torch.randint(0, 50, (2500,)), torch.randn(2500, 50) * 3, torch.rand(2500)
    teacher = Teacher(lambda part: wanted[part], weight=0.3, temperature=1.7)
    total, losses = linear_cross_entropy(hidden, weight, labels, shares, teacher=teacher)
    functional, logits = torch.nn.functional, hidden @ weight.T
    plain = functional.cross_entropy(logits, labels, reduction="none")
    sides = (logits / 1.7).log_softmax(1), (wanted / 1.7).log_softmax(1)
    apart = 1.7**2 * functional.kl_div(*sides, reduction="none", log_target=True).sum(1)
    expected = ((0.7 * plain + 0.3 * apart) * shares).sum()
    torch.testing.assert_close(losses, plain.detach())
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-3)
    ours, theirs = (torch.autograd.grad(one, (hidden, weight)) for one in (total, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_an_example_counts_by_its_weight() -> None:
    rng = np.random.default_rng(0)
    heavy, light = example(rng, 3, 3), example(rng, 4, 5)
    model = tiny_model()
    alone = [model(pad([s], 0)).loss for s in (heavy, light)]
    heavy.target = ImageTarget(range(0), weight=3.0)
    for batch in (pad([light, heavy], 0), pack([light, heavy], 32, 0)):
        output = model(batch)
        torch.testing.assert_close(output.loss, 3 * alone[0] + alone[1])
        torch.testing.assert_close(output.losses.sum(), alone[0] + alone[1])


def test_places_of_codes_are_told_apart_in_both_directions() -> None:
    """Each cell has features of its own, near cells like ones; outside of a picture there are none."""
    cells = torch.stack(torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij"), 2)
    found = cell_features(cells, 130, 0.1)
    assert found.shape == (64, 64, 130)
    torch.testing.assert_close(found[..., :128].square().mean().sqrt(), torch.tensor(0.1), atol=1e-3, rtol=0)
    flat = torch.nn.functional.normalize(found.flatten(0, 1), dim=1)
    assert float((flat @ flat.T - 2 * torch.eye(4096)).max()) < 0.999
    middle = flat.view(64, 64, -1)[32, 32]
    assert middle @ flat.view(64, 64, -1)[32, 33] > middle @ flat.view(64, 64, -1)[32, 40]
    assert (cell_features(torch.tensor([[-1, -1]]), 130, 0.1) == 0).all()


def test_every_parameter_takes_part_without_pictures_too() -> None:
    model = tiny_model().train()
    model(pad([example(np.random.default_rng(0), 3, 3)], 0)).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_nothing_to_train_gives_no_loss() -> None:
    sequence = example(np.random.default_rng(0), 3, 3)
    sequence.labels[:] = IGNORE
    assert tiny_model()(pad([sequence], 0)).loss is None


def test_saved_and_loaded_again_is_the_same_also_in_shards_and_by_auto_model(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=False)
    batch = pad([example(np.random.default_rng(0), 5, 5, ((2, 2),))], 0)
    expected = model(batch).hidden
    save_network(model, tmp_path / "one")
    save_network(model, tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    theirs = [AutoModel.from_pretrained(tmp_path / name) for name in ("one", "many")]
    assert all(isinstance(one, openm6.hf.M6Model) for one in theirs)
    for loaded in (load_model(tmp_path / "one"), load_model(tmp_path / "many"), *theirs):
        assert torch.equal(loaded.eval()(batch).hidden, expected)
    assert AutoConfig.from_pretrained(tmp_path / "one").hidden_size == 32


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = tiny_model()
    save_network(model, tmp_path)
    assert load_model(tmp_path).head_weight.shape == (97, 32)


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    save_network(tiny_model(), tmp_path)
    tiny_config(hidden_size=64).save(tmp_path)
    with pytest.raises(OpenM6Error, match=r"embed.weight has the shape \[97, 32\].*asks for \[97, 64\]"):
        load_model(tmp_path)


def test_truncated_and_missing_weights_are_refused(tmp_path: Path) -> None:
    save_network(tiny_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OpenM6Error, match="truncated or damaged"):
        load_model(tmp_path)
    file.unlink()
    with pytest.raises(OpenM6Error, match="no model.safetensors"):
        load_model(tmp_path)


def test_weights_start_at_their_scale() -> None:
    """GPT-2: what writes into the stream starts smaller by 1/sqrt(2 layers); pictures come in at a token's scale."""
    model = M6(tiny_config(hidden_size=64, num_hidden_layers=8, image_embedder="stem", stem_widths=[16, 32]))
    for block in model.blocks:
        for linear, scale in (
            (block.attention.qkv, 1.0),
            (block.attention.out, 0.25),
            (block.feed_forward.up, 1.0),
            (block.feed_forward.down, 0.25),
        ):
            assert linear.weight.std().item() == pytest.approx(0.02 * scale, rel=0.1)
    assert model.image is not None
    features = model.image(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8))
    assert features.std().item() < 0.5
