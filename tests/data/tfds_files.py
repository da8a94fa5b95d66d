"""Prepared TFDS data sets, written without TensorFlow."""

import json
import pathlib
from collections.abc import Mapping, Sequence


def write_tfds(folder: pathlib.Path, kind: str, rows: Sequence[Mapping[str, str]], name: str = "tiny") -> pathlib.Path:
    """A data set whose split "train" has rows of texts, as "array_record" or "tfrecord"; returns its one file."""
    import tensorflow_datasets as tfds

    folder.mkdir(parents=True)

    def field(number: int, body: bytes) -> bytes:
        size = len(body)
        length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
        return bytes([number << 3 | 2]) + length + body

    def example(row: Mapping[str, str]) -> bytes:  # tf.train.Example with a bytes feature for each text
        features = (field(1, key.encode()) + field(2, field(1, field(1, text.encode()))) for key, text in row.items())
        return field(1, b"".join(field(1, feature) for feature in features))

    examples = [example(row) for row in rows]
    path = folder / f"{name}-train.{kind}-00000-of-00001"
    if kind == "array_record":
        from array_record.python import array_record_module

        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for one in examples:
            writer.write(one)
        writer.close()
    else:
        crc = bytes(4)
        path.write_bytes(b"".join(len(one).to_bytes(8, "little") + crc + one + crc for one in examples))
    tfds.features.FeaturesDict({key: tfds.features.Text() for key in rows[0]}).save_config(folder)
    split = {
        "name": "train",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "numBytes": "1",
        "shardLengths": [str(len(rows))],
    }
    info = {"name": name, "version": "1.0.0", "fileFormat": kind, "moduleName": name, "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return path
