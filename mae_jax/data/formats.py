"""What files pictures come in."""

import contextlib

from PIL import (  # importing a plugin registers its format
    AvifImagePlugin,  # noqa: F401
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

with contextlib.suppress(ImportError):  # optional: it reads what telephones write
    from pillow_heif import register_heif_opener

    register_heif_opener()

# What pictures for training come in. Pillow knows more formats, some of which start other programs (EPS).
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "DIB", "PPM", "AVIF", "HEIF") if name in Image.OPEN
)
_NAMES = {*FORMATS, "MPO"}  # several JPEGs in one file, which opens as JPEG
EXTENSIONS = tuple(sorted(extension for extension, name in Image.EXTENSION.items() if name in _NAMES))
