"""Wide Residual Networks for small images, WRN-d-k, as stock PyTorch modules.

Paper: Zagoruyko, Komodakis, "Wide Residual Networks" (2016), https://arxiv.org/abs/1605.07146. Blocks of two 3x3
convolutions in pre-activation order, `k` times as many channels as the thin network of the same depth, dropout between
the convolutions. Where the shape changes, a 1x1 convolution projects what the first convolution reads, as in the
authors' code. What differs: convolutions start Kaiming-normal by their fan out, as all networks here.
(``wide_resnet50_2`` and its like, for large images, are in :mod:`resnet_fused.models.resnet`.)
"""

from __future__ import annotations

from torch import Tensor, nn

from .preact import PreActBasicBlock, PreActResNetCifar
from .stages import NormLayer


class WideBlock(PreActBasicBlock):
    """:class:`PreActBasicBlock` with dropout between its convolutions: WRN's ``B(3, 3)``.

    ``conv2(dropout(relu(bn2(conv1(a))))) + shortcut`` with ``a = relu(bn1(x))``; the shortcut is ``downsample(a)``, or
    `x` itself if `downsample` is None.

    Args:
        dropout_rate: probability of zeroing a value between the convolutions in training; 0: there is no such module.
        shared: the arguments of :class:`PreActBasicBlock`.

    Raises:
        ValueError: `dropout_rate` is not in [0, 1].
    """

    def __init__(self, *shared, dropout_rate: float = 0.0, **named) -> None:
        super().__init__(*shared, **named)
        self.dropout = nn.Dropout(dropout_rate) if dropout_rate else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(out)
        out = self.relu(self.bn2(self.conv1(out)))
        if self.dropout is not None:
            out = self.dropout(out)
        out = self.conv2(out)
        if self.drop_path is not None:
            out = self.drop_path(out)
        return out + identity


class WideResNet(PreActResNetCifar):
    """WRN-`depth`-`widen_factor` for small images, ``[N, 3, 32, 32]`` -> class scores ``[N, num_classes]``.

    Args:
        depth: layers with the 1x1 projections counted: 6n + 4, with n blocks in each of the three stages.
        widen_factor: k of the paper; the stages have 16k, 32k and 64k channels.
        dropout_rate: between the convolutions of each block (the paper's 0.3 for CIFAR, 0.4 for SVHN).
        num_classes: outputs of the last linear layer.
        zero_init_residual: start the last convolution of each block at 0, so that each block starts as its shortcut.
        norm_layer: builds a norm layer from a channel count; default ``nn.BatchNorm2d``.
        stochastic_depth_rate, stochastic_depth_mode: see :class:`~resnet_fused.models.ResNet`.

    Raises:
        ValueError: `depth` is not 6n + 4, `widen_factor` is below 1 or `dropout_rate` not in [0, 1]; see also
            `stochastic_depth_rate`.
    """

    _activates_stem = False

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        dropout_rate: float = 0.0,
        num_classes: int = 10,
        zero_init_residual: bool = False,
        norm_layer: NormLayer | None = None,
        stochastic_depth_rate: float = 0.0,
        stochastic_depth_mode: str = "row",
    ) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"WideResNet: depth must be 6n + 4, one of 10, 16, 22, 28, 34, 40, ..., got {depth}")
        if widen_factor < 1:
            raise ValueError(f"WideResNet: widen_factor must be at least 1, got {widen_factor}")
        if not 0 <= dropout_rate <= 1:
            raise ValueError(f"WideResNet: dropout_rate must be in [0, 1], got {dropout_rate}")
        super().__init__(
            WideBlock,
            ((depth - 4) // 6,) * 3,
            num_classes,
            zero_init_residual,
            norm_layer,
            stochastic_depth_rate,
            stochastic_depth_mode,
            width=16 * widen_factor,
        )
        for block in self.modules() if dropout_rate else ():
            if isinstance(block, WideBlock):
                block.dropout = nn.Dropout(dropout_rate)


def wrn28_10(**options) -> WideResNet:
    """WRN-28-10 (Zagoruyko and Komodakis 2016), 36.5 M parameters. `options` are those of :class:`WideResNet`."""
    return WideResNet(28, 10, **options)


def wrn16_8(**options) -> WideResNet:
    """WRN-16-8 (Zagoruyko and Komodakis 2016), 11.0 M parameters. `options` are those of :class:`WideResNet`."""
    return WideResNet(16, 8, **options)


def wrn40_4(**options) -> WideResNet:
    """WRN-40-4 (Zagoruyko and Komodakis 2016), 8.9 M parameters. `options` are those of :class:`WideResNet`."""
    return WideResNet(40, 4, **options)
