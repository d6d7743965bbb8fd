"""Files of arrays: NumPy's, TIFFs of every layout, DICOM; what is damaged or ambiguous is named."""

import io
import sys

import numpy as np
import pytest
import tifffile

from mae_jax.data.arrays import read_array
from mae_jax.data.decoding import BadImage
from mae_jax.runtime.errors import UserError
from tests.data.conftest import decode

LIMIT = 10**6
STACK = np.random.default_rng(0).integers(0, 4096, (40, 50, 13)).astype(np.uint16)


def npy(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def npz(**arrays) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **{"photometric": "minisblack"} | options)
    return stream.getvalue()


def pages(*arrays: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as file:
        for array in arrays:
            file.write(array, photometric="minisblack", **options)
    return stream.getvalue()


CONTIG, PLANES = {"planarconfig": "contig"}, np.moveaxis(STACK, 2, 0)
LAYOUTS = {
    "npy": npy(STACK),
    "big-endian npy in Fortran order": npy(np.asfortranarray(STACK.astype(">u2"))),
    "npz of one array": npz(anything=STACK),
    "npz of an image and more": npz(image=STACK, mask=STACK[..., 0]),
    "interleaved": tiff(STACK, **CONTIG),
    "planar": tiff(PLANES, planarconfig="separate"),
    "pages": tiff(PLANES),
    "pages one by one": pages(*PLANES),
    "pages without a description": pages(*PLANES, metadata=None),
    "one directory for all pages": tiff(PLANES, truncate=True),
    "ImageJ": tiff(PLANES, imagej=True, metadata={"axes": "CYX"}),
    "OME": tiff(PLANES, ome=True, metadata={"axes": "CYX"}),
    "big-endian BigTIFF": tiff(STACK, bigtiff=True, byteorder=">", **CONTIG),
    "deflate with a predictor": tiff(STACK, compression="deflate", predictor=True, **CONTIG),
    "LZW in tiles": tiff(STACK, compression="lzw", predictor=True, tile=(16, 16), **CONTIG),
    "Zstandard": tiff(PLANES, compression="zstd", planarconfig="separate"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_13_bands_of_every_layout_are_the_same_picture(name):
    found = decode(LAYOUTS[name], 13, LIMIT)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, STACK)
    np.testing.assert_array_equal(decode(LAYOUTS[name], 3, LIMIT, None, (12, 0, 7)), STACK[..., [12, 0, 7]])


@pytest.mark.parametrize("channels", [1, 3])
def test_three_grey_pages_are_no_colours_unless_bands_are_chosen(channels):
    scan = pages(*(STACK[..., page].astype(np.uint8) for page in range(3)))
    with pytest.raises(BadImage, match="a file of 3 pages: save each as a file, or choose some as channels"):
        decode(scan, channels, LIMIT)
    assert decode(scan, 3, LIMIT, None, (2, 0, 1)).shape == (*STACK.shape[:2], 3)


def test_smaller_copies_in_a_tiff_are_no_bands():
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as file:
        file.write(STACK[..., 0])
        file.write(STACK[::2, ::2, 0], subfiletype=1)
    np.testing.assert_array_equal(decode(stream.getvalue(), 1, LIMIT)[..., 0], STACK[..., 0])


@pytest.mark.parametrize("name", ["npy", "npz of one array", "pages", "interleaved", "deflate with a predictor"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_bad(name, share):
    data = LAYOUTS[name]
    with pytest.raises(BadImage):
        decode(data[: int(share * len(data))], 13, LIMIT)


BAD = {
    "two arrays": (npz(a=STACK, b=STACK), "an archive of a, b: name the picture's array image"),
    "objects": (npy(np.array([{}], object), allow_pickle=True), "damaged: Object arrays cannot be loaded"),
    "texts": (npy(np.array([["a", "b"]])), "<U1, which are no numbers"),
    "complex": (npy(np.zeros((4, 5), complex)), "complex128, which are no numbers"),
    "a line": (npy(np.zeros(5)), r"float64\[5\], not a picture \[h, w\] or \[h, w, c\]"),
    "empty": (npy(np.zeros((4, 0, 3))), "without pixels"),
    "channels first": (
        npy(np.zeros((3, 40, 50))),
        r"has 50 channels, .*if its channels are first, make it \[h, w, c\]",
    ),
    "pages": (pages(STACK[..., 0], STACK[::2, ::2, 0]), "a TIFF of 2 pages that differ in size or type: save each"),
    "large": (npy(np.zeros((1001, 1000))), "1000 x 1001 pixels are more than data.max_pixels=1000000"),
    "large TIFF": (tiff(np.zeros((1001, 1000), np.uint16)), "1000 x 1001 pixels are more than data.max_pixels=1000000"),
    "no TIFF": (b"II*\0" + b"\xff" * 40, "damaged"),
    "no archive": (b"PK\x03\x04" + b"\0" * 40, "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_named(name):
    data, message = BAD[name]
    with pytest.raises(BadImage, match=message):
        decode(data, 13, LIMIT)


NO_DATA = [(42113, 2, 0, "-9999", True)]  # GDAL_NODATA: tag, ASCII, length, text


def test_gdals_value_for_no_data_becomes_nan_in_floats():
    values = np.array([[1.5, -9999], [-9999, 4]], np.float32)
    for dtype in (np.float32, np.float64):
        found = decode(tiff(values.astype(dtype), extratags=NO_DATA), 1, LIMIT)
        np.testing.assert_array_equal(found[..., 0], np.array([[1.5, np.nan], [np.nan, 4]], np.float32))


@pytest.mark.parametrize("dtype, text", [(np.int16, "-9999"), (np.uint8, "0"), (np.uint16, "0")])
def test_of_whole_numbers_it_becomes_nan_only_in_batches_of_float32(dtype, text):
    values = np.array([[float(text), 3], [4, float(text)]]).astype(dtype)
    data = tiff(values, extratags=[(42113, 2, 0, text, True)])
    np.testing.assert_array_equal(decode(data, 1, LIMIT)[..., 0], values)
    np.testing.assert_array_equal(decode(data, 1, LIMIT, "float32")[..., 0], [[np.nan, 3], [4, np.nan]])


def test_a_mask_of_true_and_false_is_white_and_black():
    mask = STACK[..., 0] > 2000
    np.testing.assert_array_equal(decode(npy(mask), 1, LIMIT)[..., 0], mask * 255)
    assert decode(npy(mask), 1, LIMIT).dtype == np.uint8


def test_8_bit_pictures_of_other_formats_are_left_to_pillow():
    for data in (tiff(np.zeros((4, 5, 3), np.uint8), photometric="rgb"), b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"GIF89a"):
        assert read_array(data, LIMIT) is None


@pytest.mark.parametrize("name", ["npz of one array", "pages", "interleaved"])
def test_a_file_of_more_values_than_the_memory_holds_is_bad_before_they_are_read(name, monkeypatch):
    monkeypatch.setattr("mae_jax.data.arrays.MAX_VALUE_BYTES", STACK.nbytes - 1)
    with pytest.raises(BadImage, match=f" bytes of values, more than {STACK.nbytes - 1:,}: cut it into smaller"):
        decode(LAYOUTS[name], 13, LIMIT)


def dicom(values: np.ndarray, **tags) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    record = pydicom.Dataset()
    record.file_meta = pydicom.dataset.FileMetaDataset()
    record.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    record.file_meta.MediaStorageSOPClassUID = record.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    record.Rows, record.Columns = values.shape[-2:]
    record.SamplesPerPixel, record.PhotometricInterpretation = 1, "MONOCHROME2"
    record.BitsAllocated, record.BitsStored, record.HighBit = 16, 12, 11
    record.PixelRepresentation = int(values.dtype.kind == "i")
    record.PixelData = values.tobytes()
    if values.ndim == 3:
        record.NumberOfFrames = len(values)
    for name, value in tags.items():
        setattr(record, name, value)
    stream = io.BytesIO()
    record.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def test_a_dicom_picture_has_its_rescaled_values_and_white_where_a_viewer_shows_it():
    values = STACK[..., 0]
    plain = decode(dicom(values), 1, LIMIT)
    assert plain.dtype == np.uint16
    np.testing.assert_array_equal(plain[..., 0], values)
    rescaled = decode(dicom(values, RescaleSlope=2, RescaleIntercept=-1024), 1, LIMIT)
    assert rescaled.dtype == np.float32
    np.testing.assert_array_equal(rescaled[..., 0], 2.0 * values - 1024)
    inverted = decode(dicom(values, PhotometricInterpretation="MONOCHROME1"), 1, LIMIT)
    np.testing.assert_array_equal(inverted[..., 0], 4095 - values)
    signed = decode(dicom(values.astype(np.int16) - 2048, PhotometricInterpretation="MONOCHROME1"), 1, LIMIT)
    np.testing.assert_array_equal(signed[..., 0], 2047 - values.astype(int))
    np.testing.assert_array_equal(decode(dicom(PLANES), 13, LIMIT), STACK)
    with pytest.raises(BadImage, match="a file of 3 pages: save each"):
        decode(dicom(PLANES[:3]), 3, LIMIT)


def test_a_dicom_record_that_is_damaged_or_no_picture_is_bad():
    with pytest.raises(BadImage, match="damaged"):
        decode(dicom(STACK[..., 0])[:2000], 1, LIMIT)
    record = dicom(STACK[..., 0], Modality="SR")
    import pydicom

    text = pydicom.dcmread(io.BytesIO(record))
    del text.PixelData
    stream = io.BytesIO()
    text.save_as(stream)
    with pytest.raises(BadImage, match="a DICOM record without a picture .SR."):
        decode(stream.getvalue(), 1, LIMIT)


def test_a_dicom_file_names_the_package_that_reads_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match="a DICOM file, which needs another package: pip install pydicom"):
        decode(b"\0" * 128 + b"DICM" + b"\0" * 40, 1, LIMIT)
