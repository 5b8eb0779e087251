"""Models and data sets by name, or by `package.module:callable`."""

SMALL_IMAGE_PX = 64
"""Inputs up to this height and width count as small: ResNets get a CIFAR stem, crops are pad-and-shift, and sets that
fit stay on the device."""
