"""A data set of TensorFlow Datasets as a source, read without TensorFlow."""

import errno
import shlex

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.records import Records
from mae_jax.data.sources import SOURCES, Source
from mae_jax.data.transforms import Size
from mae_jax.runtime.errors import UserError, first_line, reason, with_patience
from mae_jax.settings.registry import nearest

_LABELS_AT_ONCE = 256  # records read together for their labels: each holds its encoded picture


class TfdsSource(Source):
    """One split of a TFDS data set that was prepared as ArrayRecord; pictures stay encoded, or are arrays [h, w, c].

    `data.name` is such as "imagenet2012:5.1.0", `data.path` TFDS's data_dir, a split also a slice: "train[:10%]". Of
    several pictures or labels TFDS's own choice (`supervised_keys`) comes first, then the names "image" and "label",
    then the order; arrays only where there are no pictures. Raises UserError for what does not exist or is not prepared
    (with the command that prepares it).
    """

    def __init__(self, split: str, data: ConfigDict, image_size: Size, channels: int):
        import tensorflow_datasets as tfds  # imported here: runs on other data need not wait for it

        name, setting, split = data.name, f"data.{split}_split", data[f"{split}_split"]
        builder = _make_builder(tfds, name, data.path)
        features = builder.info.features
        supervised = builder.info.supervised_keys or ()
        self._image_key = _choose(features, tfds.features.Image, (*supervised, "image"))
        self._label_key = _choose(features, tfds.features.ClassLabel, (*supervised, "label"))
        encoded = self._image_key is not None
        if not encoded:
            arrays = [key for key, f in features.items() if type(f) is tfds.features.Tensor and len(f.shape) == 3]
            self._image_key = next((key for key in (*supervised, "image", *arrays) if key in arrays), None)
        if self._image_key is None:
            raise UserError(f"data.name={name}: it has no images, only {', '.join(features)}")
        if encoded and features[self._image_key].np_dtype == np.float32:
            raise UserError(f"data.name={name}: its images are float32 numbers in 8-bit pictures, which are not read")
        if not builder.is_prepared():
            options = [f"--data_dir={data.path}"] if data.path else []
            options += ["--manual_dir=FOLDER_OF_THE_ARCHIVES"] if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else []
            raise UserError(
                f"data.name={name} is not prepared in {builder.data_dir}: once, run "
                f"{_command('build', name, *options, '--file_format=array_record')}, or set data.path to the "
                "data_dir where it is; for a folder of pictures, set data.name=image_folder"
            )
        try:
            decoders = {self._image_key: tfds.decode.SkipDecoding()} if encoded else None
            self._records = Records(builder.as_data_source(split=split, decoders=decoders))
        except NotImplementedError as error:  # in a format without random access, such as TFRecord
            options = [f"--dataset_version_dir={builder.data_dir}", "--out_file_format=array_record"]
            raise UserError(
                f"data.name={name} is prepared in {builder.data_dir} as {builder.info.file_format.value}, which "
                f"cannot be read in random order: once, run {_command('convert_format', *options)}"
            ) from error
        except ValueError as error:
            raise UserError(
                f"{setting}={split}: {name} has no such split, or it is empty; there are "
                f"{', '.join(sorted(builder.info.splits))}, and slices of them such as train[:10%]"
            ) from error
        height, width, _ = features[self._image_key].shape
        self.picture_size = (height, width) if height and width else None
        label = features[self._label_key] if self._label_key else None
        self.class_names = list(label.names) if label and label.num_classes else None
        self.place = f"in {name} {split}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        record = self._records.read(lambda records: records[index])
        if record[self._image_key] is None:  # from a truncated file
            raise OSError(errno.EBADMSG, "the record is empty; its file may be cut short")
        return {"image": record[self._image_key], "label": int(record[self._label_key]) if self._label_key else -1}

    def labels(self) -> np.ndarray:
        """Reads every record, but decodes no picture; raises UserError if that fails."""
        labels = np.full(len(self), -1, np.int64)
        for first in range(0, len(self) if self.num_classes else 0, _LABELS_AT_ONCE):
            some = list(range(first, min(first + _LABELS_AT_ONCE, len(self))))
            try:  # together: record by record takes three times as long
                found = with_patience(lambda some=some: self._records.read(lambda records: records.__getitems__(some)))
                labels[some] = [record[self._label_key] for record in found]
            except (OSError, TypeError) as error:  # a truncated file has no label
                why = reason(error) if isinstance(error, OSError) else "records are empty"
                raise UserError(f"the labels {self.place} cannot be read: {why}; prepare the data set again") from error
        return labels


def _make_builder(tfds, name: str, data_dir: str | None):
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        hint = nearest(name, (*SOURCES, *tfds.list_builders(with_community_datasets=False)))
        raise UserError(f"data.name={name}: not one of {', '.join(SOURCES)} or a TFDS data set{hint}") from error
    except ImportError as error:  # whose last line has the remedy
        why = str(error).strip().rpartition("\n")[2]
        raise UserError(f"data.name={name}: install the package that TFDS needs for it: {why}") from error
    except Exception as error:  # TFDS has no one type for a wrong version, config or spelling
        raise UserError(f"data.name={name}: TFDS cannot open it: {first_line(error)}") from error


def _choose(features, feature_type: type, preferred: tuple[str, ...]) -> str | None:
    """The key of a feature of this type: the first preferred one, else the first of all."""
    keys = [key for key, feature in features.items() if isinstance(feature, feature_type)]
    return next((key for key in (*preferred, *keys) if key in keys), None)


def _command(*arguments: str) -> str:
    return f"`pip install tensorflow && {shlex.join(['tfds', *arguments])}`"
