"""Cuts parts out of JPEGs in less time than Pillow."""

import numpy as np

from mae_jax.data.transforms import Box, Size

try:
    import simplejpeg
    from kornia_rs import imgproc
except ImportError:  # not every platform has their wheels
    simplejpeg = imgproc = None


def cut_jpeg(data: bytes, box: Box, size: Size) -> np.ndarray | None:
    """The box of a grey or RGB JPEG, resized to uint8 [*size, 3]; None if it is not in order, or packages are missing.

    The pixels before resizing are Pillow's: both decoders are libjpeg-turbo. The filter is Pillow's bicubic, too, but
    does not round and clip between rows and columns, and repeats the box's edge where Pillow leaves out what lies
    beyond. Crops of 224 pixels are 62 dB from Pillow's; 95 % of their values are the same.
    """
    if imgproc is None:
        return None
    try:
        image = simplejpeg.decode_jpeg(data)  # refuses whatever libjpeg warns of
    except Exception:  # for Pillow to tell what is wrong, or to read it all the same
        return None
    top, left, height, width = box
    image = np.ascontiguousarray(image[top : top + height, left : left + width])
    return imgproc.resize(image, tuple(size), "bicubic", antialias=True)
