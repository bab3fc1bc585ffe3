"""Layer groups of dual encoders: the towers are paired by depth, and what is above them is the head."""

import math
import re

import pytest
import torch
import transformers
from torch import nn

from fastai_tl.all import *

SIZES = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, attention_heads=2)
IMAGE = dict(SIZES, image_size=16, patch_size=8)
TEXT = dict(SIZES, vocab_size=60, max_position_embeddings=16, pad_token_id=1, bos_token_id=0, eos_token_id=2)


def make(kind, n_text=2, n_image=4):
    "A dual encoder of a kind with random weights"
    text, image = dict(TEXT, num_hidden_layers=n_text), dict(IMAGE, num_hidden_layers=n_image)
    if kind == 'Align':
        image = dict(image_size=32, hidden_dim=16, num_hidden_layers=2, width_coefficient=0.1, depth_coefficient=0.1)
    if kind == 'AltCLIP':
        text['project_dim'] = 16
    sizes = dict(text_config=text, vision_config=image, projection_dim=32 if kind == 'Align' else 8)
    config = getattr(transformers, f'{kind}Config')(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, f'{kind}Model')(config)


def of_block(name, tower):
    "Number of the layer of a tower that a parameter is in; `None` outside the layers"
    found = re.match(rf'{tower}\..*?\b(?:layers|layer|resblocks)\.(\d+)\.', name)
    return int(found[1]) if found else None


KINDS = ['CLIP', 'Siglip', 'Siglip2', 'AltCLIP', 'ChineseCLIP', 'MetaClip2']


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('sizes', [(2, 4), (4, 2), (3, 3), (1, 3)])
def test_towers_are_paired(kind, sizes):
    "Layer i of m is in the group of layer ceil(i n/m) of n; embeddings below, projections and scale above"
    model = make(kind, *sizes)
    groups = layer_groups(model)
    n = max(sizes)
    assert [g.name for g in groups] == ['embeddings', *(f'layer.{i}' for i in range(n)), 'head']
    names = [name for g in groups for name in g.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for place, group in enumerate(groups):
        for name in group.names:
            for tower, m in zip(('text_model', 'vision_model'), sizes):
                i = of_block(name, tower)
                if i is not None:
                    assert place == math.ceil((i + 1) * n / m), name
            if 'embeddings' in name:
                assert place == 0, name
            if not name.startswith(('text_model', 'vision_model')):
                assert place == n + 1, name
    for tower in ('text_model', 'vision_model'):
        assert any(name.startswith(tower) for name in groups[0].names)
        assert any(name.startswith(tower) for name in groups[-2].names)
    assert any('logit_scale' in name for name in groups[-1].names)


def test_align():
    "A tower of another architecture, whose blocks are convolutions"
    model = make('Align')
    groups = layer_groups(model)
    names = [name for g in groups for name in g.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert {name.split('.')[0] for name in groups[0].names} == {'text_model', 'vision_model'}
    assert {name.split('.')[0] for name in groups[-2].names} == {'text_model', 'vision_model'}
    assert 'temperature' in groups[-1].names and 'text_projection.weight' in groups[-1].names
    depths = [int(o[1]) for g in groups for name in g.names if (o := re.search(r'vision_model.*blocks\.(\d+)\.', name))]
    assert depths == sorted(depths) and len(set(depths)) > 2


def test_layer_freezer():
    "`freeze_to(-2)` trains the head and the top layer of both towers, also of a model inside another"
    model = nn.ModuleDict(dict(encoder=make('CLIP', 3, 3), classifier=nn.Linear(8, 2)))
    LayerFreezer(model).freeze_to(-2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {name.split('.layers.')[0] + '.' + name.split('.layers.')[1][0] for name in trained if '.layers.' in name}
    assert layers == {'encoder.text_model.encoder.2', 'encoder.vision_model.encoder.2'}
    rest = {name.removeprefix('encoder.').split('.')[0] for name in trained if '.layers.' not in name}
    assert rest == {'text_projection', 'visual_projection', 'logit_scale', 'classifier', 'text_model', 'vision_model'}
    top = {name for name in trained if '_model.' in name and '.layers.' not in name}
    assert all('norm' in name for name in top)


def test_gradual_unfreezing_trains():
    "Each stage trains the groups above and no others, with the contrastive loss of the model"
    model = make('CLIP', 2, 2)
    ids, pixels = torch.randint(3, 60, (4, 8)), torch.randn(4, 3, 16, 16)
    freezer = LayerFreezer(model)
    for stage in range(1, freezer.num_layers + 1):
        freezer.freeze_to(-stage)
        model.zero_grad()
        model(input_ids=ids, pixel_values=pixels, return_loss=True).loss.backward()
        with_gradient = [any(p.grad is not None for p in g.params) for g in freezer.layers]
        assert with_gradient == [i >= freezer.num_layers - stage for i in range(freezer.num_layers)]


def test_other_models_with_two_parts():
    "A model with one tower, and one in which the text reads the image, have the groups that they had"
    clip = make('CLIP')
    text = layer_groups(clip.text_model)
    assert [g.name for g in text][1:3] == ['layers.0', 'layers.1']
    image = transformers.CLIPForImageClassification(clip.config)
    assert [g.name for g in layer_groups(image)][1] == 'layers.0'


@pytest.mark.parametrize('kind', [*KINDS, 'Align'])
def test_logits_and_loss_of_transformers(kind):
    "Similarities, loss and zero-shot scores equal those of the model's own forward pass"
    from fastai_tl.models.dual_encoder import ZeroShotImages

    hf = make(kind, 2, 2).eval()
    if kind == 'Siglip2':
        with pytest.raises(FastaiTLError, match='images of one size'):
            DualEncoder(hf)
        return
    size = 32 if kind == 'Align' else 16
    if kind == 'Align': # random convolutions give almost nothing until their norms have seen images
        for module in hf.modules():
            module.momentum = 1.0
        hf.train()(input_ids=torch.randint(3, 60, (8, 8)), pixel_values=torch.randn(8, 3, size, size))
        hf.eval()
    ids, pixels = torch.randint(3, 60, (3, 8)), torch.randn(3, 3, size, size)
    ids[:, -1] = 2
    ids[1, 5:] = torch.tensor([2, 1, 1])
    mask = (ids != 1).long()
    model = DualEncoder(hf)
    with torch.no_grad():
        theirs = hf(input_ids=ids, attention_mask=mask, pixel_values=pixels, return_loss=True)
        ours = model(ids.where(mask > 0, -1), pixels.clone())
    wanted = theirs.logits_per_text
    # padding is 0 where it is hidden by the mask, so compare the rows without padding for models that pool by id
    torch.testing.assert_close(ours[[0, 2]], wanted[[0, 2]], atol=1e-4, rtol=1e-4)
    loss = ImageTextLoss('sigmoid' if model.is_sigmoid else 'softmax')
    if kind != 'Align': # whose own loss is smoothed
        torch.testing.assert_close(loss(wanted), theirs.loss, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        features = model.text_features(ids, mask)
    scores = ZeroShotImages(model, ['a', 'b', 'c'], features).scores(pixels)
    torch.testing.assert_close(scores, theirs.logits_per_image, atol=1e-4, rtol=1e-4)


def test_recall():
    "Recall@k is the share of the rows whose own column is among the k largest"
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 40, generator=draw)
    for k in (1, 3, 10, 40):
        by_hand = sum(i in row.topk(k).indices.tolist() for i, row in enumerate(scores)) / 40
        assert retrieval_recall(scores, k) == pytest.approx(by_hand)
    assert retrieval_recall(torch.zeros(3, 3), 2) == 0
