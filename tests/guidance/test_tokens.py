import pytest
import torch
import torch.nn.functional as F

from mmauxq.guidance.tokens import extra_tokens, resize_tokens, to_map


def test_tokens_are_pooled_as_the_image_that_they_are():
    image = torch.randn(2, 3, 8, 8)
    token = torch.randn(2, 1, 3)
    tokens = torch.cat([token, image.flatten(2).transpose(1, 2)], 1)
    pooled = resize_tokens(tokens, 17)
    expected = F.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled[:, 1:], expected)
    assert torch.equal(pooled[:, :1], token)
    torch.testing.assert_close(resize_tokens(tokens, 16), expected)


@pytest.mark.parametrize(
    'count, extra',
    [(1, 0), (16, 0), (17, 1), (18, 2), (19, 0), (24, 0), (65, 1), (67, 0)],
)
def test_extra_tokens_stand_before_a_square_image(count, extra):
    assert extra_tokens(count) == extra


def test_tokens_of_no_square_image_are_one_row():
    tokens = torch.randn(2, 12, 3)
    row = tokens.transpose(1, 2)
    assert torch.equal(to_map(tokens), row.unsqueeze(2))
    for count in (8, 4):
        torch.testing.assert_close(
            resize_tokens(tokens, count),
            F.adaptive_avg_pool1d(row, count).transpose(1, 2),
        )
    square = torch.randn(2, 16, 3)
    torch.testing.assert_close(
        resize_tokens(square, 7),
        F.adaptive_avg_pool1d(square.transpose(1, 2), 7).transpose(1, 2),
    )
    assert resize_tokens(tokens, 12) is tokens


def test_a_known_size_shapes_the_map():
    image = torch.randn(2, 3, 2, 8)
    tokens = image.flatten(2).transpose(1, 2)
    assert torch.equal(to_map(tokens, (2, 8)), image)
    # not of that many: a square
    assert to_map(tokens, (3, 8)).shape == (2, 3, 4, 4)


def test_a_missing_extra_token_starts_as_the_mean():
    tokens = torch.randn(2, 16, 3)
    more = resize_tokens(tokens, 17)
    assert torch.equal(more[:, 1:], tokens)
    torch.testing.assert_close(more[:, 0], tokens.mean(1))
