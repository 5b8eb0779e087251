"""Models by name: `small_cnn`, torchvision's classification models, timm's, or `package.module:callable`."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call

from acmds_optimizer.errors import DataError, first_line
from acmds_optimizer.zoo import SMALL_IMAGE_PX
from acmds_optimizer.zoo.imports import load_callable
from acmds_optimizer.zoo.names import unknown_model


class SmallCNN(nn.Module):
    """Five 3x3 convolutions with BatchNorm, 32 to 128 channels; 140,000 parameters.

    For tiny images on machines without a GPU: above 95 % on the 8x8 digits after a few seconds on a CPU. Takes
    (n, in_channels, H, W) with H and W of at least 8, gives (n, num_classes).
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(in_channels, 32), *_block(32, 32), nn.MaxPool2d(2),
            *_block(32, 64), *_block(64, 64), nn.MaxPool2d(2),
            *_block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip  # a line a resolution
        self.head = nn.Linear(128, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.features(inputs))


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def model_names() -> list[str]:
    """Every name that `build_model` knows, sorted."""
    return sorted(["small_cnn", *torchvision.models.list_models(module=torchvision.models)])


def build_model(
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """A model with fresh weights (from torch's global random state) that gives (n, num_classes) logits.

    torchvision's models are changed in two ways, by the arguments alone. ResNets (resnet*, resnext*, wide_resnet*)
    for inputs whose larger side has at most 64 px get the CIFAR stem: a 3x3 convolution of stride 1 and no max-pool,
    since the usual stem would shrink a 32 px image to 8 px before the first block. Where `in_channels` is not 3, the
    first convolution of any model is replaced by one of that many input channels. With `pretrained` weights only the
    last layer is new.

    Args:
        name: one of `model_names()`, `timm/` and a name of timm's, or `package.module:callable`, which is called with
            num_classes=... alone.
        num_classes: size of the output, at least 1.
        in_channels: channels of an input.
        image_size: (height, width) of an input in pixels, or one number for both; None: 224.
        pretrained: start from the weights that torchvision or timm has for it, downloaded once.

    Raises:
        DataError: unknown name, a callable that cannot be used, a model that cannot take inputs of this size, or
            weights that are not there.
    """
    check_name(name, pretrained=pretrained)
    size = image_size if isinstance(image_size, tuple) else (image_size or 224,) * 2
    if name.startswith("timm/"):
        model = _timm_model(name, num_classes, in_channels, size, pretrained)
        _check_size(name, model, in_channels, size)
        return model
    if ":" in name:
        return _foreign_model(name, num_classes)
    if name == "small_cnn":
        if min(size) < 8:
            raise DataError(f"small_cnn takes images of at least 8 px, not {_px(size)}")
        return SmallCNN(num_classes, in_channels)
    model = _torchvision_model(name, num_classes, in_channels, size, pretrained)
    _check_size(name, model, in_channels, size)
    return model


def check_name(name: str, *, pretrained: bool = False) -> None:
    """See that `build_model` knows this name, in milliseconds and before any data are read.

    Raises:
        DataError: it does not, or has no `pretrained` weights for it.
    """
    if pretrained and (":" in name or name == "small_cnn"):
        raise DataError(f"model {name!r}: has no pretrained weights here; load them in its own code")
    if name.startswith("timm/"):
        timm, theirs = _timm(name), name.removeprefix("timm/")
        if not timm.is_model(theirs):
            close = difflib.get_close_matches(theirs, timm.list_models(), n=3)
            hint = f": did you mean {' or '.join(f'timm/{each}' for each in close)}?" if close else ""
            raise DataError(f"timm has no model named {theirs!r}{hint}")
    elif ":" in name:
        load_callable(name, "model")
    elif name not in model_names():
        raise unknown_model(name, model_names())


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """See that the model of this name may take items of that shape; what one's own takes is not known.

    Raises:
        DataError: they are no images (C, H, W), and the model takes nothing else.
    """
    own = ":" in name and not name.startswith("timm/")
    if not own and len(shape) != 3:
        raise DataError(
            f"model {name!r}: takes images (C, H, W), but an item of this data set has shape {shape}. A model of your "
            f"own for such items is given as package.module:callable"
        )


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError:
        raise DataError(f"model {name!r}: timm is not installed: pip install 'acmds[timm]'") from None
    return timm


def freeze(model: nn.Module, what: str | None) -> None:
    """Leave parameters untrained.

    Args:
        model: as built.
        what: `backbone`: all but the last layer that has any; else comma-separated beginnings of parameter names;
            None: nothing.

    Raises:
        DataError: a beginning that no parameter's name has.
    """
    if what is None:
        return
    names = [name for name, _ in model.named_parameters()]
    if what == "backbone":
        head = names[-1].rpartition(".")[0]
        starts = [name for name in names if name.rpartition(".")[0] != head]
    else:
        starts = [start.strip() for start in what.split(",") if start.strip()]
        for start in starts:
            if not any(name.startswith(start) for name in names):
                parts = sorted({name.split(".")[0] for name in names})
                raise DataError(f"freeze: no parameter's name begins with {start!r}; the model has {', '.join(parts)}")
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(starts)):
            parameter.requires_grad_(False)


def _timm_model(name: str, num_classes: int, in_channels: int, size: tuple[int, int], pretrained: bool) -> nn.Module:
    timm, theirs = _timm(name), name.removeprefix("timm/")
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels, "pretrained": pretrained}
    try:
        try:
            return timm.create_model(theirs, img_size=size[0] if size[0] == size[1] else size, **options)
        except TypeError:  # only transformers are built for a size
            return timm.create_model(theirs, **options)
    except (OSError, RuntimeError, ValueError) as error:
        if pretrained:
            raise _no_weights(name, error) from error
        raise _wrong_size(name, size, error) from error


def _no_weights(name: str, error: Exception) -> DataError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(
        f"model {name!r}: its pretrained weights could not be loaded: {said}. Check the network, "
        "or leave --pretrained out"
    )


def _pretrained(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """A torchvision model with its best weights and a new last layer."""
    try:
        model: nn.Module = torchvision.models.get_model(name, weights="DEFAULT", **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_weights(name, error) from error
    path, head = next(
        (path, module)
        for path, module in reversed(list(model.named_modules()))
        if isinstance(module, (nn.Linear, nn.Conv2d))
    )
    if isinstance(head, nn.Linear):
        new: nn.Module = nn.Linear(head.in_features, num_classes)
    else:  # squeezenet ends in a convolution
        new = nn.Conv2d(head.in_channels, num_classes, kernel_size=1)
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
    return model


def _torchvision_model(
    name: str, num_classes: int, in_channels: int, size: tuple[int, int], pretrained: bool
) -> nn.Module:
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}  # one output; True is the default, which otherwise warns
    elif name.startswith("vit_"):
        options = {"image_size": max(size)}  # it takes square images only, as the check of the size will say
    elif name == "maxvit_t":
        options = {"input_size": size}
    if pretrained:
        if in_channels != 3:
            raise DataError(f"model {name!r}: pretrained weights take 3 channels, but the images have {in_channels}")
        options.pop("init_weights", None)
        return _pretrained(name, num_classes, options)
    try:
        model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    except (ValueError, AssertionError, RuntimeError) as error:  # transformers refuse sizes when they are built
        raise _wrong_size(name, size, error) from error
    if isinstance(model, torchvision.models.ResNet) and max(size) <= SMALL_IMAGE_PX:
        model.conv1 = nn.Conv2d(in_channels, model.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif in_channels != 3:
        _replace_first_convolution(model, in_channels)
    return model


def _replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    """Give the first convolution `in_channels` inputs; all of torchvision's models register it first."""
    path, old = next((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]  # Conv2d keeps its sizes as tuples of any length
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def _check_size(name: str, model: nn.Module, in_channels: int, size: tuple[int, int]) -> None:
    """Run the shapes alone (meta tensors: no memory, no arithmetic) through the model."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {path: torch.empty_like(tensor, device="meta") for path, tensor in state.items()}
    try:
        functional_call(model.eval(), shapes, (torch.empty(1, in_channels, *size, device="meta"),))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _wrong_size(name, size, error) from error
    finally:
        model.train()


def _wrong_size(name: str, size: tuple[int, int], error: Exception) -> DataError:
    said = first_line(str(error).strip()) or type(error).__name__
    return DataError(f"{name} cannot take images of {_px(size)} ({said}). Give another image_size or model")


def _px(size: tuple[int, int]) -> str:
    """(height, width) as one reads it: `32 px`, or width first, `64x8 px`."""
    height, width = size
    return f"{width} px" if height == width else f"{width}x{height} px"


def _foreign_model(name: str, num_classes: int) -> nn.Module:
    build = load_callable(name, "model")
    try:
        inspect.signature(build).bind(num_classes=num_classes)
    except TypeError as error:
        raise DataError(f"model {name!r}: must accept one argument, num_classes=...: {error}") from None
    except ValueError:  # a builtin without a signature
        pass
    model = build(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise DataError(f"model {name!r}: must return a torch.nn.Module, but returned a {type(model).__name__}")
    return model
