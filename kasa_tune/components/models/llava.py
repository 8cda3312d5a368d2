"""LLaVA-1.5: a CLIP tower, a connector, and our decoder, in which images stand among the tokens.

Shapes: n images, p patches, f features of an image, c tower width, b rows, s tokens, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kasa_tune.architectures import Architecture, Vision
from kasa_tune.components.adapters.whole import train_whole
from kasa_tune.components.models.attention import Mask
from kasa_tune.components.models.decoder import Decoder


class VisionLayer(nn.Module):
    """A layer of the tower: ``x [n, 1 + p, c]`` to the same shape.

    Its linears are not named as a decoder's are, so that adapters are attached to none of them.

    Args:
        v: the tower.
    """

    def __init__(self, v: Vision) -> None:
        super().__init__()
        self.num_heads, self.activation = v.num_heads, v.activation
        self.norm1, self.norm2 = (nn.LayerNorm(v.embed_dim, v.norm_eps) for _ in range(2))
        self.query, self.key, self.value, self.out = (
            nn.Linear(v.embed_dim, v.embed_dim) for _ in range(4)
        )
        self.fc1 = nn.Linear(v.embed_dim, v.intermediate_dim)
        self.fc2 = nn.Linear(v.intermediate_dim, v.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Let the patches of each image see one another."""
        h = self.norm1(x)
        q, k, v = (
            linear(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [n, heads, 1 + p, -1]
            for linear in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(seen)
        h = self.fc1(self.norm2(x))
        h = F.gelu(h) if self.activation == "gelu" else h * torch.sigmoid(1.702 * h)
        return x + self.fc2(h)


class VisionTower(nn.Module):
    """CLIP's vision transformer, up to the layer whose output LLaVA reads.

    Args:
        v: the tower.
    """

    def __init__(self, v: Vision) -> None:
        super().__init__()
        self.keeps_class = v.keeps_class
        self.class_embedding = nn.Parameter(torch.zeros(v.embed_dim))
        self.patches = nn.Conv2d(3, v.embed_dim, v.patch_size, stride=v.patch_size, bias=False)
        self.positions = nn.Embedding(v.num_patches + 1, v.embed_dim)
        self.norm = nn.LayerNorm(v.embed_dim, v.norm_eps)
        self.layers = nn.ModuleList(VisionLayer(v) for _ in range(v.num_layers))

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[n, f, c]`` of ``images [n, 3, h, w]``, which are normalized."""
        patches = self.patches(images).flatten(2).mT  # [n, p, c]
        first = self.class_embedding.expand(len(images), 1, -1)
        x = self.norm(torch.cat((first, patches), dim=1) + self.positions.weight)
        for layer in self.layers:
            x = layer(x)
        return x if self.keeps_class else x[:, 1:]


class Connector(nn.Module):
    """From the tower's features ``[n, f, c]`` to inputs of the decoder ``[n, f, d]``.

    Args:
        a: the model, with its vision.
        v: the same vision.
        is_trained: whether it is trained whole where adapters are attached to the decoder.
    """

    def __init__(self, a: Architecture, v: Vision, is_trained: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(v.embed_dim, a.embed_dim, bias=v.connector_bias)
        self.linear_2 = nn.Linear(a.embed_dim, a.embed_dim, bias=v.connector_bias)
        if is_trained:
            train_whole(self.linear_1, self.linear_2)

    def forward(self, features: Tensor) -> Tensor:
        """Two linears with a GELU between them, in the dtype of their weights."""
        x = features.to(self.linear_1.weight.dtype)
        return self.linear_2(F.gelu(self.linear_1(x)))


class Llava(Decoder):
    """A decoder that also sees: ``forward(tokens [b, s], images [n, 3, h, w])``.

    An image takes ``architecture.vision.num_features`` placeholder tokens of a row, which its
    features replace. The images of a batch are given row after row, in the order of their
    placeholders. Names of the decoder's modules are those of :class:`Decoder`.

    Args:
        architecture: what it computes, with its ``vision``.
        train_connector: whether the connector is trained where adapters are attached.

    Raises:
        ValueError: the placeholder token is beyond the vocabulary.
    """

    def __init__(self, architecture: Architecture, *, train_connector: bool = True) -> None:
        super().__init__(architecture)
        vision = architecture.vision
        assert vision is not None
        if vision.image_token >= architecture.vocab_size:
            raise ValueError(
                f"The placeholder of images is token {vision.image_token} (image_token_index), and "
                f"the vocabulary has {architecture.vocab_size} tokens."
            )
        self.image_token, self.image_size = vision.image_token, vision.image_size
        self.num_features = vision.num_features
        self.vision = VisionTower(vision)
        self.connector = Connector(architecture, vision, train_connector)

    def forward(
        self,
        tokens: Tensor,
        *,
        images: Tensor | None = None,
        mask: Mask = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Logits of every token's successor.

        Args:
            tokens: ``[b, s]``.
            images: ``[n, 3, h, w]``, normalized, of all rows. None if no row has one.
            mask: as of :class:`Decoder`.
            input_pos: as of :class:`Decoder`.

        Returns:
            ``[b, s, vocab]`` in float32.

        Raises:
            ValueError: the rows have more or fewer placeholders than the images have features, or
                the images are of another size than the tower's.
        """
        self._validate_inputs(tokens.shape[1], mask=mask, input_pos=input_pos)
        h = self.embed(tokens, input_pos, images=images)
        for layer in self.layers:
            h = layer(h, mask=mask, input_pos=input_pos)
        return self.unembed(h)

    def embed(
        self, tokens: Tensor, input_pos: Tensor | None = None, *, images: Tensor | None = None
    ) -> Tensor:
        """The first layer's input ``[b, s, d]``: embedded tokens, features of images in the places
        of their placeholders. Arguments and errors are those of :meth:`forward`.
        """
        h = super().embed(tokens, input_pos)
        if tokens.is_meta:
            return h
        places = tokens == self.image_token
        # A token that is read alone is the model's own choice, and stands for no image.
        if images is not None or tokens.shape[1] > 1:
            self._check(int(places.sum()), images)
        if images is None:
            return h
        with torch.no_grad():  # the tower is frozen
            features = self.vision(images.to(h.device, self.vision.patches.weight.dtype))
        return h.masked_scatter(places[..., None], self.connector(features).to(h.dtype))

    def _check(self, num_places: int, images: Tensor | None) -> None:
        """Compare placeholders and images before anything is computed."""
        side = self.image_size
        if images is not None and images.shape[1:] != (3, side, side):
            raise ValueError(
                f"Images must be of shape (3, {side}, {side}) each; given is {(*images.shape,)}."
            )
        num_images = 0 if images is None else len(images)
        if num_places != num_images * self.num_features:
            raise ValueError(
                f"The rows have {num_places} placeholders of images (token {self.image_token}), and "
                f"{num_images} images have {num_images * self.num_features} features, "
                f"{self.num_features} each. Give each image its {self.num_features} placeholders."
            )
